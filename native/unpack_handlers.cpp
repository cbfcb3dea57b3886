// What XLA calls to make dense weights of entries, entries of dense ones, and to find the largest of many numbers.
#include "handlers.h"
#include "operands.h"

namespace msbp {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// `in` and `out` are the entries and the dense weight, or the other way.
ffi::Error copy(ffi::ThreadPool threads, const Operand& entries, const Operand& dense, const Operand& starts,
                const Operand& inputs, const Operand& in, const Operand& out, int64_t instruction_set, bool unpacks) {
  Check check;
  check.rank(entries, 1);
  check_lists(check, {&starts, &inputs});
  check.rank(dense, 2);
  check.real(in);
  check.dtype(out, {in.dtype}, "of the dtype that is copied");
  if (!check.good()) return check.error();
  DenseWeight p{};
  p.m = dense.shape[0], p.n = dense.shape[1], p.entries = entries.shape[0], p.halves = in.bfloat16();
  check.range("inputs", p.m, 1, kMost);
  check.range("features", p.n, 1, kMost);
  check.range("entries", p.entries, 1, kMost);
  check.shape(starts, {p.n + 1});
  check.shape(inputs, {p.entries});
  for (const Operand* one : {&starts, &inputs, &in}) check.batch(*one, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.entries + p.m * p.n / 8);
  return for_each_pattern(out.batch, [&](int64_t b) {
    DenseWeight element = p;
    element.starts = ints(starts, b, out.batch);
    element.inputs = ints(inputs, b, out.batch);
    element.in = in.at(b, out.batch);
    element.out = out.at(b, out.batch);
    return (unpacks ? kernels->unpack : kernels->pack)(element, pool);
  });
}

ffi::Error unpack(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer starts, ffi::AnyBuffer inputs,
                  ffi::Result<ffi::AnyBuffer> out, int64_t instruction_set) {
  const Operand entries("values", values, 1), dense("dense weight", *out, 2);
  return copy(threads, entries, dense, Operand("starts of lists", starts, 1), Operand("inputs", inputs, 1), entries,
              dense, instruction_set, true);
}

ffi::Error pack(ffi::ThreadPool threads, ffi::AnyBuffer in, ffi::AnyBuffer starts, ffi::AnyBuffer inputs,
                ffi::Result<ffi::AnyBuffer> out, int64_t instruction_set) {
  const Operand entries("values", *out, 1), dense("dense weight", in, 2);
  return copy(threads, entries, dense, Operand("starts of lists", starts, 1), Operand("inputs", inputs, 1), dense,
              entries, instruction_set, false);
}

ffi::Error largest(ffi::ThreadPool threads, ffi::AnyBuffer scores_, ffi::AnyBuffer count_,
                   ffi::Result<ffi::AnyBuffer> out_, int64_t instruction_set) {
  const Operand scores("scores", scores_, 1), count("count", count_, 1), out("places", *out_, 1);
  Check check;
  for (const Operand* one : {&scores, &count, &out}) check.rank(*one, 1);
  check.dtype(scores, {ffi::DataType::F32}, "float32");
  for (const Operand* one : {&count, &out}) check.dtype(*one, {ffi::DataType::S32}, "int32");
  if (!check.good()) return check.error();
  check.shape(count, {1});
  check.range("scores", scores.shape[0], 1, kMost);
  check.range("places", out.shape[0], 1, kMost);
  for (const Operand* one : {&scores, &count}) check.batch(*one, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, scores.shape[0]);
  return for_each_of_batch(out.batch, [&](int64_t b) {
    const int32_t wanted = *ints(count, b, out.batch);
    kernels->largest({reinterpret_cast<const float*>(scores.at(b, out.batch)), scores.shape[0], wanted, out.shape[0],
                      reinterpret_cast<int32_t*>(out.at(b, out.batch))},
                     pool);
  });
}

auto copy_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("instruction_set");
}

XLA_FFI_DEFINE_HANDLER(unpack_handler, unpack, copy_binding());
XLA_FFI_DEFINE_HANDLER(pack_handler, pack, copy_binding());
XLA_FFI_DEFINE_HANDLER(largest_handler, largest,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("instruction_set"));

}  // namespace

std::vector<Handler> unpack_handlers() {
  return {{"msbp_unpack", reinterpret_cast<void*>(unpack_handler)},
          {"msbp_pack", reinterpret_cast<void*>(pack_handler)},
          {"msbp_largest", reinterpret_cast<void*>(largest_handler)}};
}

}  // namespace msbp
