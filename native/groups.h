// Products for groups of rows that share their features: small dense products, blocked in registers.
//
//   dx[group] = p[group] wT[features of the group]          [r, k] x [k, m]
//   dw[features of the group] += p[group]T x[group]         [k, r] x [r, m]
#pragma once

#include <type_traits>

#include "tile.h"

namespace {

constexpr int kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * VL;  // columns of a register block
#if MSBP_VECTOR_FLOATS >= 16
constexpr int kBlockRows = 12;  // rows of a register block, of 32 registers
#elif MSBP_VECTOR_FLOATS >= 8
constexpr int kBlockRows = 6;  // of 16 registers
#else
constexpr int kBlockRows = 4;
#endif

// out[0, width) += total.
MSBP_INLINE void add_panel(const Floats* total, float* out, int64_t width) {
  if (width == kPanel) {
    for (int v = 0; v < kPanelVectors; ++v) store(out + v * VL, load(out + v * VL) + total[v]);
    return;
  }
  float last[kPanel];
  for (int v = 0; v < kPanelVectors; ++v) store(last + v * VL, total[v]);
  for (int64_t i = 0; i < width; ++i) out[i] += last[i];
}

// out[q][0, width) (+)= sum over t in [0, length) of a[t][q] * panel[t].
template <int R>
MSBP_INLINE void multiply(int64_t length, const float* a, const float* panel, bool add, float* const* out,
                          int64_t width) {
  Floats total[R][kPanelVectors];
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q)
    for (int v = 0; v < kPanelVectors; ++v) total[q][v] = Floats{};
  for (int64_t t = 0; t < length; ++t) {
    Floats b[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) b[v] = load(panel + t * kPanel + v * VL);
#pragma GCC unroll 16
    for (int q = 0; q < R; ++q) {
      const Floats value = broadcast(a[t * R + q]);
      for (int v = 0; v < kPanelVectors; ++v) total[q][v] += value * b[v];
    }
  }
  if (width == kPanel) {
#pragma GCC unroll 16
    for (int q = 0; q < R; ++q)
      for (int v = 0; v < kPanelVectors; ++v) {
        float* place = out[q] + v * VL;
        store(place, add ? load(place) + total[q][v] : total[q][v]);
      }
    return;
  }
  for (int q = 0; q < R; ++q) {
    float last[kPanel];
    for (int v = 0; v < kPanelVectors; ++v) store(last + v * VL, total[q][v]);
    for (int64_t i = 0; i < width; ++i) out[q][i] = add ? out[q][i] + last[i] : last[i];
  }
}

// Calls body with a number of rows, up to R, that is known when it runs, as a constant.
template <int R, typename Body>
MSBP_INLINE void with_rows(int64_t rows, const Body& body) {
  if (rows == R) {
    body(std::integral_constant<int, R>{});
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, body);
  }
}

template <int R>
void multiply_rows(int64_t rows, int64_t length, const float* a, const float* panel, bool add, float* const* out,
                   int64_t width) {
  with_rows<R>(rows, [&](auto size) { multiply<size.value>(length, a, panel, add, out, width); });
}

// How `count` rows are cut into register blocks: as few as there must be, and as even as possible.
struct Blocks {
  int64_t count, number;

  explicit Blocks(int64_t count) : count(count), number(ceil_div(count, kBlockRows)) {}
  int64_t begin(int64_t block) const { return block * count / number; }
  int64_t size(int64_t block) const { return begin(block + 1) - begin(block); }
};

// The values of a group as float32, in the order in which the products read them: block after block of rows (of kept
// features if transposed), and within a block step after step. Every tile reads them, so they are packed once.
template <bool kTransposed, typename Value>
const float* packed(const msbp::Product& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  float* all = scratch<float>(msbp::Slot::kValues, p.groups * p.r * p.k);
  const Blocks blocks(kTransposed ? p.k : p.r);
  const int64_t length = kTransposed ? p.r : p.k;
  parallel(pool, p.groups * blocks.number, [&](int64_t task) {
    const int64_t group = task / blocks.number, block = task % blocks.number;
    const int64_t begin = blocks.begin(block), size = blocks.size(block);
    const Value* in = values + group * p.r * p.k;
    float* out = all + group * p.r * p.k + begin * length;
    for (int64_t t = 0; t < length; ++t)
      for (int64_t q = 0; q < size; ++q)
        *out++ = widen(kTransposed ? in[t * p.k + begin + q] : in[(begin + q) * p.k + t]);
  });
  return all;
}

template <typename Value, typename Other>
void grad_input_by_groups(const msbp::Product& p, msbp::Pool& pool) {
  const float* values = packed<false, Value>(p, pool);
  const Blocks blocks(p.r);
  const Features features = Features::used(p.index, p.groups * p.k, p.n);
  const int64_t tile_floats = tile_width(features.count, p.m, 12 * pool.threads());
  parallel(pool, ceil_div(p.m, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* tile = scratch<float>(msbp::Slot::kTile, features.count * tile_floats);
    float* panel = scratch<float>(msbp::Slot::kRow, p.k * kPanel);
    pack_weight(static_cast<const Other*>(p.other), p.features_last, p.m, p.n, features, 0, features.count, first, width,
                tile_floats, tile);
    for (int64_t group = 0; group < p.groups; ++group) {
      const int32_t* index = p.index + group * p.k;
      for (int64_t column = 0; column < width; column += kPanel) {
        for (int64_t e = 0; e < p.k; ++e) {
          const float* row = tile + features.where(index[e]) * tile_floats + column;
          for (int v = 0; v < kPanelVectors; ++v) store(panel + e * kPanel + v * VL, load(row + v * VL));
        }
        for (int64_t block = 0; block < blocks.number; ++block) {
          float unused[kPanel];  // for the rows that pad the last group
          float* out[kBlockRows];
          for (int64_t q = 0; q < blocks.size(block); ++q) {
            const int64_t i = group * p.r + blocks.begin(block) + q;
            out[q] = i < p.rows ? p.out + i * p.m + first + column : unused;
          }
          multiply_rows<kBlockRows>(blocks.size(block), p.k, values + (group * p.r + blocks.begin(block)) * p.k, panel,
                                    false, out, least(kPanel, width - column));
        }
      }
    }
  });
}

template <typename Value, typename Other>
void grad_weight_by_groups(const msbp::Product& p, msbp::Pool& pool) {
  constexpr int64_t kRowsAtOnce = 256;  // of x: a panel of them, 16 floats wide, stays in the first-level cache
  const float* values = packed<true, Value>(p, pool);
  const Blocks blocks(p.k);
  const Other* x = static_cast<const Other*>(p.other);
  const Features features = Features::used(p.index, p.groups * p.k, p.n);
  const int64_t tile_floats = tile_width(features.count, p.m, 12 * pool.threads());
  parallel(pool, ceil_div(p.m, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* result = scratch<float>(msbp::Slot::kResult, features.count * tile_floats);
    float* panels = scratch<float>(msbp::Slot::kTile, least(kRowsAtOnce, p.r) * tile_floats);
    std::memset(result, 0, features.count * tile_floats * sizeof(float));
    for (int64_t group = 0; group < p.groups; ++group) {
      const int32_t* index = p.index + group * p.k;
      const int64_t present = least(p.r, p.rows - group * p.r);
      for (int64_t begin = 0; begin < present; begin += kRowsAtOnce) {
        const int64_t rows = least(kRowsAtOnce, present - begin);
        for (int64_t i = 0; i < rows; ++i) {
          const Other* row = x + (group * p.r + begin + i) * p.m + first;
          prefetch(row + kAhead * p.m, width);
          for (int64_t column = 0; column < width; column += kPanel)
            copy_row(row + column, least(kPanel, width - column), panels + column * rows + i * kPanel, kPanel);
        }
        for (int64_t column = 0; column < width; column += kPanel) {
          for (int64_t block = 0; block < blocks.number; ++block) {
            const int64_t e = blocks.begin(block), size = blocks.size(block);
            float* out[kBlockRows];
            for (int64_t q = 0; q < size; ++q) out[q] = result + features.where(index[e + q]) * tile_floats + column;
            multiply_rows<kBlockRows>(size, rows, values + (group * p.k + e) * p.r + begin * size,
                                      panels + column * rows, true, out, kPanel);
          }
        }
      }
    }
    unpack_gradient(result, tile_floats, features, p.m, p.n, first, width, p.features_last, p.out);
  });
}

}  // namespace
