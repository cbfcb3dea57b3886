// u = g + memory, the k best columns of each group of rows, their entries, and what is left for the memory, with each
// group of rows read from main memory once.
//
// A row of g that is 0 takes no part: nothing is added to it, it has no score, and it is left out of what is left.
//
// Sums over rows are made in an order that depends on shapes only, never on threads: row after row within a block, block
// after block.
#pragma once

#include "parallel.h"
#include "top_k.h"

namespace {

constexpr int64_t kMemoryBlocks = 32;  // partial sums of the memory, added up in their order
constexpr int64_t kSplitRows = 64;     // a few large groups are summed in blocks of this many rows

template <typename T>
MSBP_INLINE Floats at(const T* g, const float* memory, int64_t j) {
  return memory ? load(g + j) + load(memory + j) : load(g + j);
}

template <typename T>
struct Selection {
  const msbp::Select& s;
  const T* g;
  T* values;
  int64_t groups;

  explicit Selection(const msbp::Select& s)
      : s(s),
        g(static_cast<const T*>(s.gradient)),
        values(static_cast<T*>(s.values)),
        groups(ceil_div(s.rows, s.r)) {}

  const T* row(int64_t i) const { return g + i * s.n; }
  const float* memory(int64_t i) const { return s.memory && s.by_slot ? s.memory + i * s.n : s.memory; }
  int64_t end_of(int64_t group) const { return least(s.rows, (group + 1) * s.r); }
  bool means() const { return s.memory && !s.by_slot; }

  // Whether there is a memory in which row i of g takes no part. For most rows, the first entries tell.
  MSBP_INLINE bool idle(int64_t i) const {
    if (!s.memory) return false;
    const T* x = row(i);
    int64_t j = 0;
    for (; j + VL <= s.n; j += VL)
      if (any_bit(magnitude(load(x + j)))) return false;
    for (; j < s.n; ++j)
      if (magnitude_bits(widen(x[j]))) return false;
    return true;
  }

  // A partial sum of what is left: n numbers, and how many rows took part.
  int64_t stride() const { return s.n + 1; }

  void run(msbp::Pool& pool) const {
    if (groups < 8 && s.r >= 2 * kSplitRows) {
      few_large_groups(pool);
    } else {
      many_groups(pool);
    }
  }

  // Blocks of whole groups, each for itself; the blocks' partial memories are added up at the end.
  void many_groups(msbp::Pool& pool) const {
    const int64_t per_block = ceil_div(groups, kMemoryBlocks), blocks = ceil_div(groups, per_block);
    float* partials = means() ? scratch<float>(msbp::Slot::kPartials, blocks * stride()) : nullptr;
    parallel(pool, blocks, [&](int64_t block) {
      float* left = partials ? partials + block * stride() : nullptr;
      if (left) std::memset(left, 0, stride() * sizeof(float));
      float* space = scratch<float>(msbp::Slot::kRow, 4 * s.n + 65);
      Guess guess;
      for (int64_t group = block * per_block; group < least(groups, (block + 1) * per_block); ++group) {
        s.r == 1 ? one_row(group, left, guess, space) : rows(group, left, guess, space);
      }
    });
    if (means()) finish_memory(partials, blocks);
  }

  void one_row(int64_t i, float* left, Guess& guess, float* space) const {
    const int64_t n = s.n;
    float* stored = space;
    int32_t* bits = reinterpret_cast<int32_t*>(space + n + 16);
    int32_t* where = bits + n + 16;
    if (idle(i)) {
      for (int64_t c = 0; c < s.k; ++c) s.index[i * s.k + c] = static_cast<int32_t>(c);
      take_row(i, i, bits);
      return;
    }
    const T* gradient = row(i);
    const float* m = memory(i);
    const float* u = stored;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (!m) u = gradient;
    }
    Floats a{}, b{};
    int64_t j = 0;
    for (; j + 2 * VL <= n; j += 2 * VL) {
      const Floats x = at(gradient, m, j), y = at(gradient, m, j + VL);
      if (u == stored) store(stored + j, x), store(stored + j + VL, y);
      a += magnitude(x), b += magnitude(y);
    }
    float total = sum(a + b);
    for (; j < n; ++j) {
      const float x = widen(gradient[j]) + (m ? m[j] : 0.0f);
      if (u == stored) stored[j] = x;
      total += from_bits(magnitude_bits(x));
    }
    int32_t* index = s.index + i * s.k;
    top_k(u, n, s.k, total / static_cast<float>(n), guess, bits, where, index);
    T* kept = values + i * s.k;
    if (!s.memory) {
      for (int64_t c = 0; c < s.k; ++c) kept[c] = gradient[index[c]];
      return;
    }
    for (int64_t c = 0; c < s.k; ++c) {
      narrow(stored[index[c]], &kept[c]);
      stored[index[c]] = 0;
    }
    if (s.by_slot) {
      s.live[i] = 1;
      keep_slot(stored, s.left + i * n);
    } else {
      left[n] += 1;
      add_finite(stored, left);
    }
  }

  MSBP_INLINE void add_finite(const float* x, float* total) const {
    int64_t j = 0;
    for (; j + VL <= s.n; j += VL) store(total + j, load(total + j) + finite_or_zero(load(x + j)));
    for (; j < s.n; ++j) total[j] += finite_or_zero(x[j]);
  }

  MSBP_INLINE void keep_slot(const float* left, float* out) const {
    int64_t j = 0;
    for (; j + VL <= s.n; j += VL) store(out + j, finite_or_zero(load(left + j)));
    for (; j < s.n; ++j) out[j] = finite_or_zero(left[j]);
  }

  // Of the rows [begin, end) that take part, add |u| to `scores`, and finite entries of u to `sums`, whose last entry
  // counts the rows. Four rows at a time.
  void add_rows(int64_t begin, int64_t end, float* scores, float* sums) const {
    int64_t some[4], count = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (idle(i)) continue;
      some[count++] = i;
      if (count < 4) continue;
      add_some<4>(some, scores, sums);
      count = 0;
    }
    for (int64_t q = 0; q < count; ++q) add_some<1>(some + q, scores, sums);
  }

  template <int R>
  MSBP_INLINE void add_some(const int64_t* i, float* scores, float* sums) const {
    if (sums) {
      add_some<R, true>(i, scores, sums);
      sums[s.n] += R;
    } else {
      add_some<R, false>(i, scores, sums);
    }
  }

  template <int R, bool WithSums>
  MSBP_INLINE void add_some(const int64_t* i, float* scores, float* sums) const {
    int64_t j = 0;
    for (; j + VL <= s.n; j += VL) {
      Floats score = load(scores + j), left{};
      if (WithSums) left = load(sums + j);
      for (int q = 0; q < R; ++q) {
        const Floats x = at(row(i[q]), memory(i[q]), j);
        score += magnitude(x);
        if (WithSums) left += finite_or_zero(x);
      }
      store(scores + j, score);
      if (WithSums) store(sums + j, left);
    }
    for (; j < s.n; ++j) {
      for (int q = 0; q < R; ++q) {
        const float* m = memory(i[q]);
        const float x = widen(row(i[q])[j]) + (m ? m[j] : 0.0f);
        scores[j] += from_bits(magnitude_bits(x));
        if (WithSums) sums[j] += finite_or_zero(x);
      }
    }
  }

  void rows(int64_t group, float* left, Guess& guess, float* space) const {
    const int64_t n = s.n;
    float* scores = space;
    int32_t* bits = reinterpret_cast<int32_t*>(space + n + 16);
    int32_t* where = bits + n + 16;
    float* sums = left ? space + 3 * n + 48 : nullptr;
    std::memset(scores, 0, n * sizeof(float));
    if (sums) std::memset(sums, 0, stride() * sizeof(float));
    add_rows(group * s.r, end_of(group), scores, sums);
    int32_t* index = s.index + group * s.k;
    choose(scores, guess, bits, where, index);
    if (left) leave(sums, index, left);
    for (int64_t i = group * s.r; i < (group + 1) * s.r; ++i) take_row(group, i, bits);
  }

  void choose(const float* scores, Guess& guess, int32_t* bits, int32_t* where, int32_t* index) const {
    float total = 0;
    for (int64_t j = 0; j < s.n; ++j) total += scores[j];
    top_k(scores, s.n, s.k, total / static_cast<float>(s.n), guess, bits, where, index);
  }

  // Add the columns that the group does not keep to the memory's sum.
  void leave(float* sums, const int32_t* index, float* left) const {
    for (int64_t c = 0; c < s.k; ++c) sums[index[c]] = 0;
    add_finite(sums, left);
    left[s.n] += sums[s.n];
  }

  // The kept entries of row i, and what is left of it for its own memory; zeros for rows that take no part or pad the
  // last group.
  void take_row(int64_t group, int64_t i, int32_t* space) const {
    const int32_t* index = s.index + group * s.k;
    T* kept = values + i * s.k;
    if (i >= s.rows) {
      std::memset(kept, 0, s.k * sizeof(T));
      return;
    }
    if (idle(i)) {
      std::memset(kept, 0, s.k * sizeof(T));
      if (!s.by_slot) return;
      s.live[i] = 0;
      std::memset(s.left + i * s.n, 0, s.n * sizeof(float));
      return;
    }
    const T* gradient = row(i);
    const float* m = memory(i);
    if (!m) {
      for (int64_t c = 0; c < s.k; ++c) kept[c] = gradient[index[c]];
      return;
    }
    for (int64_t c = 0; c < s.k; ++c) narrow(widen(gradient[index[c]]) + m[index[c]], &kept[c]);
    if (!s.by_slot) return;
    float* u = reinterpret_cast<float*>(space);
    for (int64_t j = 0; j < s.n; ++j) u[j] = widen(gradient[j]) + m[j];
    for (int64_t c = 0; c < s.k; ++c) u[index[c]] = 0;
    s.live[i] = 1;
    keep_slot(u, s.left + i * s.n);
  }

  // Too few groups to share among threads: their rows are shared, in blocks whose sums are then added in order.
  void few_large_groups(msbp::Pool& pool) const {
    const int64_t n = s.n, blocks = ceil_div(s.r, kSplitRows), size = means() ? n + stride() : n;
    float* partials = scratch<float>(msbp::Slot::kPartials, groups * blocks * size + stride());
    parallel(pool, groups * blocks, [&](int64_t task) {
      const int64_t group = task / blocks, begin = group * s.r + task % blocks * kSplitRows;
      float* scores = partials + task * size;
      float* sums = means() ? scores + n : nullptr;
      std::memset(scores, 0, size * sizeof(float));
      const int64_t end = least(end_of(group), least(begin + kSplitRows, (group + 1) * s.r));
      add_rows(begin, end, scores, sums);
    });
    float* left = partials + groups * blocks * size;
    std::memset(left, 0, stride() * sizeof(float));
    float* space = scratch<float>(msbp::Slot::kRow, 4 * n + 65);
    int32_t* bits = reinterpret_cast<int32_t*>(space + n + 16);
    Guess guess;
    for (int64_t group = 0; group < groups; ++group) {
      float* scores = partials + group * blocks * size;
      for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t j = 0; j < size; ++j) scores[j] += scores[block * size + j];
      }
      choose(scores, guess, bits, bits + n + 16, s.index + group * s.k);
      if (means()) leave(scores + n, s.index + group * s.k, left);
    }
    parallel(pool, groups * blocks, [&](int64_t task) {
      const int64_t group = task / blocks, begin = group * s.r + task % blocks * kSplitRows;
      float* row_space = scratch<float>(msbp::Slot::kRow, 4 * n + 65);
      for (int64_t i = begin; i < least(begin + kSplitRows, (group + 1) * s.r); ++i)
        take_row(group, i, reinterpret_cast<int32_t*>(row_space));
    });
    if (means()) finish_memory(left, 1);
  }

  void finish_memory(const float* partials, int64_t blocks) const {
    for (int64_t j = 0; j <= s.n; ++j) {
      float total = partials[j];
      for (int64_t block = 1; block < blocks; ++block) total += partials[block * stride() + j];
      (j < s.n ? s.left[j] : *s.live) = finite_or_zero(total);
    }
  }
};

void select(const msbp::Select& s, msbp::Pool& pool) {
  if (s.bfloat16) {
    Selection<uint16_t>(s).run(pool);
  } else {
    Selection<float>(s).run(pool);
  }
}

}  // namespace
