// A tile: a few input features (T of the m) of a weight, of x or of dw, packed so that one output feature or one row is
// T contiguous floats. Tiles are what makes the layout of the weight not matter: a weight stored [m, n] is transposed
// while it is packed, block by block in registers, and a dw stored [m, n] while it is unpacked.
#pragma once

#include "parallel.h"

namespace {

constexpr int kTileVectors = 8;
constexpr int64_t kTileFloats = kTileVectors * VL;

// out[j][i] = in[i][j] for an 8 x 8 block.
MSBP_INLINE void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float U8 __attribute__((vector_size(32), aligned(4), may_alias));
  typedef int32_t I8 __attribute__((vector_size(32)));
  V8 a[8], b[8], c[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const U8*>(in + i * in_stride);
#ifdef __clang__
#define MSBP_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define MSBP_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, I8{__VA_ARGS__})
#endif
  for (int i = 0; i < 8; i += 2) {
    b[i] = MSBP_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = MSBP_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    c[i] = MSBP_SHUFFLE(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    c[i + 1] = MSBP_SHUFFLE(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    c[i + 2] = MSBP_SHUFFLE(b[i + 1], b[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    c[i + 3] = MSBP_SHUFFLE(b[i + 1], b[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<U8*>(out + i * out_stride) = MSBP_SHUFFLE(c[i], c[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<U8*>(out + (i + 4) * out_stride) = MSBP_SHUFFLE(c[i], c[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#undef MSBP_SHUFFLE
}

// out[j][i] = in[i][j], `height` rows of `width`.
template <typename T>
MSBP_INLINE void transpose(const T* in, int64_t in_stride, int64_t height, int64_t width, float* out,
                           int64_t out_stride) {
  int64_t i = 0;
  for (; i + 8 <= height; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= width; j += 8) {
      const T* corner = in + i * in_stride + j;
      if constexpr (sizeof(T) == sizeof(float)) {
        transpose_block(corner, in_stride, out + j * out_stride + i, out_stride);
      } else {
        float block[64];
        for (int q = 0; q < 8; ++q)
          for (int p = 0; p < 8; ++p) block[q * 8 + p] = widen(corner[q * in_stride + p]);
        transpose_block(block, 8, out + j * out_stride + i, out_stride);
      }
    }
    for (; j < width; ++j)
      for (int64_t q = i; q < i + 8; ++q) out[j * out_stride + q] = widen(in[q * in_stride + j]);
  }
  for (; i < height; ++i)
    for (int64_t j = 0; j < width; ++j) out[j * out_stride + i] = widen(in[i * in_stride + j]);
}

// Rows of a tile lie far apart in the array, so the processor does not prefetch them: fetch this many rows ahead.
constexpr int64_t kAhead = 16;

template <typename T>
MSBP_INLINE void prefetch(const T* row, int64_t width) {
  for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// Copy `width` floats, padded with zeros to `padded`.
template <typename T>
MSBP_INLINE void copy_row(const T* in, int64_t width, float* out, int64_t padded) {
  int64_t j = 0;
  for (; j + VL <= width; j += VL) store(out + j, load(in + j));
  for (; j < width; ++j) out[j] = widen(in[j]);
  for (; j < padded; ++j) out[j] = 0;
}

// Which output features take part, and where each stands in a tile: all of them, or only those that are used.
struct Features {
  int64_t count;           // in the tile
  const int32_t* columns;  // [count], ascending; null for all
  const int32_t* place;    // [n]; null for all

  // Only those that are used, if they are few, which spares reading the others. `index` has `entries` entries.
  static Features used(const int32_t* index, int64_t entries, int64_t n) {
    if (entries >= n) return {n, nullptr, nullptr};
    int32_t* columns = scratch<int32_t>(msbp::Slot::kColumns, 2 * n);
    int32_t* place = columns + n;
    std::memset(place, 0, n * sizeof(int32_t));
    for (int64_t e = 0; e < entries; ++e) place[index[e]] = 1;
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int32_t is_used = place[j];
      columns[count] = static_cast<int32_t>(j);
      place[j] = static_cast<int32_t>(count);
      count += is_used;
    }
    if (3 * count > n) return {n, nullptr, nullptr};
    return {count, columns, place};
  }
  int64_t column(int64_t i) const { return columns ? columns[i] : i; }
  int64_t where(int32_t j) const { return place ? place[j] : j; }
};

// tile[i][0, T) = input features [first, first + width) of the weight's feature i, for i in [begin, end).
template <typename T>
MSBP_INLINE void pack_weight(const T* w, bool features_last, int64_t m, int64_t n, const Features& features,
                             int64_t begin, int64_t end, int64_t first, int64_t width, int64_t tile_floats,
                             float* tile) {
  if (!features_last) {
    for (int64_t i = begin; i < end; ++i)
      copy_row(w + features.column(i) * m + first, width, tile + (i - begin) * tile_floats, tile_floats);
    return;
  }
  if (width < tile_floats) std::memset(tile, 0, (end - begin) * tile_floats * sizeof(float));
  if (!features.columns) {
    transpose(w + first * n + begin, n, width, end - begin, tile, tile_floats);
    return;
  }
  for (int64_t a = 0; a < width; ++a) {
    const T* row = w + (first + a) * n;
    for (int64_t i = begin; i < end; ++i) tile[(i - begin) * tile_floats + a] = widen(row[features.columns[i]]);
  }
}

// Write a tile of dw, [features.count][T], where it belongs; features that nobody used get zeros.
MSBP_INLINE void unpack_gradient(const float* tile, int64_t tile_floats, const Features& features, int64_t m, int64_t n,
                                 int64_t first, int64_t width, bool features_last, float* out) {
  if (features_last) {
    if (!features.columns) {
      transpose(tile, tile_floats, n, width, out + first * n, n);
      return;
    }
    for (int64_t a = 0; a < width; ++a) {
      float* row = out + (first + a) * n;
      std::memset(row, 0, n * sizeof(float));
      for (int64_t i = 0; i < features.count; ++i) row[features.columns[i]] = tile[i * tile_floats + a];
    }
    return;
  }
  int64_t i = 0;
  for (int64_t j = 0; j < n; ++j) {
    float* row = out + j * m + first;
    if (!features.columns || (i < features.count && features.columns[i] == j)) {
      std::memcpy(row, tile + i++ * tile_floats, width * sizeof(float));
    } else {
      std::memset(row, 0, width * sizeof(float));
    }
  }
}

// The width of the tiles in floats: as wide as `height` rows fit the second-level cache, but narrow enough that there
// are `wanted` tiles, so that threads get even shares.
MSBP_INLINE int64_t tile_width(int64_t height, int64_t m, int64_t wanted) {
  constexpr int64_t kCacheFloats = 160 * 1024;
  int64_t width = kTileFloats;
  while (width > 2 * VL && (height * width > kCacheFloats || ceil_div(m, width) < wanted)) width /= 2;
  return width;
}

}  // namespace
