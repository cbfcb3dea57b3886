// Products for a cotangent of which whole rows are kept, as many as there happen to be: dense products whose operands are
// gathered while they are packed.
//
//   dx[kept] = p[kept] wT           [count, n] x [n, m]; the other rows of dx are 0
//   dw = x[kept]T p[kept]           [m, count] x [count, n], or its transpose
//
// Left operands are packed in blocks of kBlockRows rows, right ones in panels of kPanel columns (see groups.h).
#pragma once

#include "groups.h"

namespace {

// The rows whose weight is not 0, ascending.
struct Kept {
  int64_t count;
  const int32_t* rows;

  static Kept of(const float* weight, int64_t rows) {
    int32_t* kept = scratch<int32_t>(msbp::Slot::kKept, rows);
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) {
      kept[count] = static_cast<int32_t>(i);
      count += weight[i] != 0;
    }
    return {count, kept};
  }
};

template <typename Value>
void live_rows(const msbp::OfRows& l, msbp::Pool& pool) {
  constexpr int64_t kRowsATask = 256;
  const Value* values = static_cast<const Value*>(l.values);
  parallel(pool, ceil_div(l.rows, kRowsATask), [&](int64_t task) {
    for (int64_t i = task * kRowsATask; i < least(l.rows, (task + 1) * kRowsATask); ++i) {
      const Value* row = values + i * l.n;
      int64_t j = 0;
      bool live = false;  // nearly every row shows in its first vector that it is
      for (; !live && j + VL <= l.n; j += VL) live = any_bit(magnitude(load(row + j)));
      for (; !live && j < l.n; ++j) live = magnitude_bits(widen(row[j])) != 0;
      l.out[i] = live ? 1.0f : 0.0f;
    }
  });
}

// A length that both operands of a register block are cut to, so that a panel stays in the second-level cache.
constexpr int64_t kStretch = 1024;

// out[t * size + q] = scale[t] row[t][begin + q]: a block of columns of the kept rows.
template <typename T>
MSBP_INLINE void pack_columns(const T* array, int64_t stride, const Kept& kept, const float* weight, int64_t begin,
                              int64_t size, int64_t padded, float* out) {
  for (int64_t t = 0; t < kept.count; ++t, out += padded) {
    const int64_t i = kept.rows[t];
    const T* row = array + i * stride + begin;
    if (t + kAhead < kept.count) prefetch(array + kept.rows[t + kAhead] * stride + begin, size);
    copy_row(row, size, out, padded);
    if (weight != nullptr && weight[i] != 1) {
      for (int64_t q = 0; q < size; ++q) out[q] *= weight[i];
    }
  }
}

template <typename Value, typename Other>
void rows_grad_input(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const Other* w = static_cast<const Other*>(p.other);
  const Kept kept = Kept::of(p.weight, p.rows);
  const Blocks blocks(kept.count);
  constexpr int64_t kRowsATask = 64;
  parallel(pool, ceil_div(p.rows, kRowsATask), [&](int64_t task) {
    for (int64_t i = task * kRowsATask; i < least(p.rows, (task + 1) * kRowsATask); ++i)
      if (p.weight[i] == 0) std::memset(p.out + i * p.m, 0, p.m * sizeof(float));
  });
  if (kept.count == 0) return;
  float* left = scratch<float>(msbp::Slot::kValues, kept.count * p.n);  // stretch after stretch, in each block after block
  parallel(pool, blocks.number, [&](int64_t block) {
    const int64_t begin = blocks.begin(block), size = blocks.size(block);
    for (int64_t from = 0; from < p.n; from += kStretch) {
      const int64_t length = least(kStretch, p.n - from);
      float* out = left + from * kept.count + begin * length;
      for (int64_t q = 0; q < size; ++q) {
        const int64_t i = kept.rows[begin + q];
        const float scale = p.weight[i];
        const Value* row = values + i * p.n + from;
        for (int64_t t = 0; t < length; ++t) out[t * size + q] = scale * widen(row[t]);
      }
    }
  });
  parallel(pool, ceil_div(p.m, kPanel), [&](int64_t task) {
    const int64_t first = task * kPanel, width = least(kPanel, p.m - first);
    float* panel = scratch<float>(msbp::Slot::kTile, least(kStretch, p.n) * kPanel);
    for (int64_t from = 0; from < p.n; from += kStretch) {
      const int64_t length = least(kStretch, p.n - from);
      if (p.features_last) {
        if (width < kPanel) std::memset(panel, 0, length * kPanel * sizeof(float));
        transpose(w + first * p.n + from, p.n, width, length, panel, kPanel);
      } else {
        for (int64_t t = 0; t < length; ++t) copy_row(w + (from + t) * p.m + first, width, panel + t * kPanel, kPanel);
      }
      for (int64_t block = 0; block < blocks.number; ++block) {
        const int64_t begin = blocks.begin(block), size = blocks.size(block);
        float* out[kBlockRows];
        for (int64_t q = 0; q < size; ++q) out[q] = p.out + kept.rows[begin + q] * p.m + first;
        multiply_rows<kBlockRows>(size, length, left + from * kept.count + begin * length, panel, from > 0, out, width);
      }
    }
  });
}

// out[a, b] = sum over the kept rows of left[a] right[b]. A task has a few blocks of rows of the result, so that what it
// writes lies together; a panel of the right operand serves all of them while it is in the second-level cache.
template <typename Left, typename Right>
void rows_outer(const Left* left, int64_t height, const float* left_weight, const Right* right, int64_t width,
                const float* right_weight, const Kept& kept, float* out, msbp::Pool& pool) {
  constexpr int64_t kBlocksATask = 4;
  const Blocks blocks(height);
  const int64_t count = kept.count, panels = ceil_div(width, kPanel);
  float* packed = scratch<float>(msbp::Slot::kValues, most(1, panels * count * kPanel));
  parallel(pool, panels, [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    pack_columns(right, width, kept, right_weight, first, least(kPanel, width - first), kPanel,
                 packed + first * count);
  });
  parallel(pool, ceil_div(blocks.number, kBlocksATask), [&](int64_t task) {
    const int64_t from = task * kBlocksATask, to = least(blocks.number, from + kBlocksATask);
    const int64_t top = blocks.begin(from);
    float* rows = scratch<float>(msbp::Slot::kTile, most(1, count) * kBlocksATask * kBlockRows);
    for (int64_t block = from; block < to; ++block) {
      const int64_t begin = blocks.begin(block), size = blocks.size(block);
      pack_columns(left, height, kept, left_weight, begin, size, size, rows + (begin - top) * count);
    }
    for (int64_t first = 0; first < width; first += kPanel) {
      for (int64_t block = from; block < to; ++block) {
        const int64_t begin = blocks.begin(block), size = blocks.size(block);
        float* place[kBlockRows];
        for (int64_t q = 0; q < size; ++q) place[q] = out + (begin + q) * width + first;
        for (int64_t t = 0; t == 0 || t < count; t += kStretch)
          multiply_rows<kBlockRows>(size, least(kStretch, count - t), rows + (begin - top) * count + t * size,
                                    packed + first * count + t * kPanel, t > 0, place, least(kPanel, width - first));
      }
    }
  });
}

template <typename Value, typename Other>
void rows_grad_weight(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const Other* x = static_cast<const Other*>(p.other);
  const Kept kept = Kept::of(p.weight, p.rows);
  if (p.features_last) {
    rows_outer<Other, Value>(x, p.m, nullptr, values, p.n, p.weight, kept, p.out, pool);
  } else {
    rows_outer<Value, Other>(values, p.n, p.weight, x, p.m, nullptr, kept, p.out, pool);
  }
}

}  // namespace
