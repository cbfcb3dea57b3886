// A dense weight [m, n] made of its entries, entries taken of a dense one, and which places of it are worth most.
#pragma once

#include <algorithm>
#include <atomic>

#include "weights.h"

namespace {

// A cache line of features of each row of the dense weight is put together apart: rows may be a power of two apart, and
// their lines then share a few places of the cache.
constexpr int64_t kFeaturesATask = 16;

// Runs body(entry, place in a block [m, 16]) for the lists of some features; false if an index is out of range.
template <typename Body>
MSBP_INLINE bool each_entry(const msbp::DenseWeight& p, int64_t begin, int64_t end, const Body& body) {
  for (int64_t o = begin; o < end; ++o)
    for (int32_t e = p.starts[o]; e < p.starts[o + 1]; ++e) {
      const int64_t input = p.inputs[e];
      if (input < 0 || input >= p.m) return false;
      body(e, input * kFeaturesATask + o - begin);
    }
  return true;
}

template <typename Value>
bool unpack(const msbp::DenseWeight& p, msbp::Pool& pool) {
  if (!are_lists(p.starts, p.n, p.entries)) return false;
  const Value* values = static_cast<const Value*>(p.in);
  std::atomic<bool> good{true};
  parallel(pool, ceil_div(p.n, kFeaturesATask), [&](int64_t task) {
    const int64_t begin = task * kFeaturesATask, end = least(p.n, begin + kFeaturesATask);
    Value* block = scratch<Value>(msbp::Slot::kTile, p.m * kFeaturesATask);
    std::fill_n(block, p.m * kFeaturesATask, Value{});
    if (!each_entry(p, begin, end, [&](int64_t entry, int64_t place) { block[place] = values[entry]; }))
      good.store(false, std::memory_order_relaxed);
    Value* dense = static_cast<Value*>(p.out) + begin;
    for (int64_t i = 0; i < p.m; ++i)
      std::memcpy(dense + i * p.n, block + i * kFeaturesATask, (end - begin) * sizeof(Value));
  });
  return good.load();
}

template <typename Value>
bool pack(const msbp::DenseWeight& p, msbp::Pool& pool) {
  if (!are_lists(p.starts, p.n, p.entries)) return false;
  Value* values = static_cast<Value*>(p.out);
  std::fill(values + p.starts[p.n], values + p.entries, Value{});  // padding
  std::atomic<bool> good{true};
  parallel(pool, ceil_div(p.n, kFeaturesATask), [&](int64_t task) {
    const int64_t begin = task * kFeaturesATask, end = least(p.n, begin + kFeaturesATask);
    Value* block = scratch<Value>(msbp::Slot::kTile, p.m * kFeaturesATask);
    const Value* dense = static_cast<const Value*>(p.in) + begin;
    for (int64_t i = 0; i < p.m; ++i)
      std::memcpy(block + i * kFeaturesATask, dense + i * p.n, (end - begin) * sizeof(Value));
    if (!each_entry(p, begin, end, [&](int64_t entry, int64_t place) { values[entry] = block[place]; }))
      good.store(false, std::memory_order_relaxed);
  });
  return good.load();
}

// The places of the largest scores of those that are 0 or more, ascending, ties to the first; `size` where there are no
// more. A float that is not negative is ordered as its bits are.
void largest(const msbp::Largest& p, msbp::Pool&) {
  int32_t* bits = scratch<int32_t>(msbp::Slot::kLists, most(1, p.size));
  int64_t candidates = 0;
  for (int64_t i = 0; i < p.size; ++i)
    if (p.scores[i] >= 0) bits[candidates++] = magnitude_bits(p.scores[i]);
  const int64_t count = most(0, least(least(p.count, p.most), candidates));
  int64_t found = 0;
  if (count > 0) {
    std::nth_element(bits, bits + count - 1, bits + candidates, [](int32_t a, int32_t b) { return a > b; });
    const int32_t threshold = bits[count - 1];
    int64_t ties = count - std::count_if(bits, bits + count, [&](int32_t b) { return b > threshold; });
    for (int64_t i = 0; i < p.size && found < count; ++i) {
      if (!(p.scores[i] >= 0)) continue;
      const int32_t own = magnitude_bits(p.scores[i]);
      if (own > threshold || (own == threshold && ties-- > 0)) p.places[found++] = static_cast<int32_t>(i);
    }
  }
  std::fill(p.places + found, p.places + p.most, static_cast<int32_t>(p.size));
}

}  // namespace
