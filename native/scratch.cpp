// Memory that each thread keeps from call to call, and which instruction sets this processor runs.
#include "kernels.h"

#include <array>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace msbp {
namespace {

struct Blocks {
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  std::array<Block, static_cast<size_t>(Slot::kCount)> blocks;
  ~Blocks() {
    for (Block& block : blocks) std::free(block.data);
  }
};

thread_local Blocks kept;

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  Blocks::Block& block = kept.blocks[static_cast<size_t>(slot)];
  if (bytes > block.bytes || block.data == nullptr) {
    std::free(block.data);
    block = {};
    // Large pages, where the system has them: in small ones, a tile takes all entries of the first-level TLB.
    const size_t page = bytes > (size_t{1} << 16) ? size_t{1} << 21 : size_t{1} << 12;
    const size_t rounded = (bytes + page - 1) / page * page;
    void* data = std::aligned_alloc(page, rounded == 0 ? page : rounded);
    if (data == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page > (size_t{1} << 12)) madvise(data, rounded, MADV_HUGEPAGE);  // a hint: it may fail
#endif
    block = {data, rounded};
  }
  return block.data;
}

const Kernels* const* available() {
  static const std::array<const Kernels*, 4> found = [] {
    std::array<const Kernels*, 4> all{};
    size_t count = 0;
#ifdef MSBP_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (avx512) all[count++] = &avx512_kernels;
    if (avx2) all[count++] = &avx2_kernels;
#endif
    all[count] = &portable_kernels;
    return all;
  }();
  return found.data();
}

}  // namespace msbp
