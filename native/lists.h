// Products for small groups, where each row has its own features: a sparse matrix, as lists, times a dense tile.
//
//   dx[i] = sum over the features j that row i keeps of p[i, j] w[:, j]     a list for each row
//   dw[j] = sum over the rows i that keep feature j of p[i, j] x[i]         a list for each feature
//
// Lists are cut into chunks, so that the part of the tile that a chunk needs stays in the second-level cache. The sums
// are accumulated in registers over a list, and over chunks in their order.
#pragma once

#include "tile.h"

namespace {

struct Entry {
  int32_t row;  // of the tile, within its chunk
  float value;
};

// out[0, V vectors) (+)= sum over the entries of value * tile[row].
template <int V>
MSBP_INLINE void add_list(const Entry* entry, const Entry* end, const float* tile, bool add, float* out, int64_t width) {
  Floats total[V];
  for (int v = 0; v < V; ++v) total[v] = Floats{};
  for (; entry != end; ++entry) {
    const float* row = tile + static_cast<int64_t>(entry->row) * (V * VL);
    const Floats value = broadcast(entry->value);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) total[v] += value * load(row + v * VL);
  }
  if (width == V * VL) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + v * VL, add ? load(out + v * VL) + total[v] : total[v]);
    return;
  }
  float last[V * VL];
  for (int v = 0; v < V; ++v) store(last + v * VL, total[v]);
  for (int64_t i = 0; i < width; ++i) out[i] = add ? out[i] + last[i] : last[i];
}

// The lists [0, count) of one chunk, whose bounds are `offsets[list]` and `offsets[list + step]`.
template <int V>
void add_lists(const Entry* entries, const int32_t* starts, const int32_t* ends, int64_t step, int64_t count,
               const float* tile, bool add, float* out, int64_t out_stride, int64_t width) {
  for (int64_t i = 0; i < count; ++i)
    add_list<V>(entries + starts[i * step], entries + ends[i * step], tile, add, out + i * out_stride, width);
}

MSBP_INLINE void add_lists(int64_t tile_floats, const Entry* entries, const int32_t* starts, const int32_t* ends,
                           int64_t step, int64_t count, const float* tile, bool add, float* out, int64_t out_stride,
                           int64_t width) {
  if (tile_floats == 8 * VL) {
    add_lists<8>(entries, starts, ends, step, count, tile, add, out, out_stride, width);
  } else if (tile_floats == 4 * VL) {
    add_lists<4>(entries, starts, ends, step, count, tile, add, out, out_stride, width);
  } else {
    add_lists<2>(entries, starts, ends, step, count, tile, add, out, out_stride, width);
  }
}

constexpr int64_t kChunk = 1024;  // rows of a tile that a chunk of the lists needs

template <typename Value, typename Other>
void grad_input_by_lists(const msbp::Product& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const Features features = Features::used(p.index, p.groups * p.k, p.n);
  const int64_t chunks = ceil_div(features.count, kChunk), step = chunks + 1;
  Entry* entries = scratch<Entry>(msbp::Slot::kLists, p.rows * p.k);
  int32_t* offsets = scratch<int32_t>(msbp::Slot::kOffsets, p.rows * step);

  const int64_t rows_a_task = most(16, ceil_div(p.rows, 4 * pool.threads()));
  parallel(pool, ceil_div(p.rows, rows_a_task), [&](int64_t task) {
    for (int64_t i = task * rows_a_task; i < least(p.rows, (task + 1) * rows_a_task); ++i) {
      const int32_t* index = p.index + i / p.r * p.k;
      int32_t* bounds = offsets + i * step;
      for (int64_t c = 0; c <= chunks; ++c) bounds[c] = 0;
      for (int64_t e = 0; e < p.k; ++e) ++bounds[features.where(index[e]) / kChunk];
      int32_t total = static_cast<int32_t>(i * p.k);
      for (int64_t c = 0; c <= chunks; ++c) {
        const int32_t here = bounds[c];
        bounds[c] = total;
        total += here;
      }
      for (int64_t e = 0; e < p.k; ++e) {
        const int64_t place = features.where(index[e]), chunk = place / kChunk;
        entries[bounds[chunk]++] = {static_cast<int32_t>(place - chunk * kChunk), widen(values[i * p.k + e])};
      }
      for (int64_t c = chunks; c > 0; --c) bounds[c] = bounds[c - 1];
      bounds[0] = static_cast<int32_t>(i * p.k);
    }
  });

  const int64_t tile_floats = tile_width(least(kChunk, features.count), p.m, 4 * pool.threads());
  const int64_t tiles = ceil_div(p.m, tile_floats);
  parallel(pool, tiles, [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* tile = scratch<float>(msbp::Slot::kTile, least(kChunk, features.count) * tile_floats);
    for (int64_t c = 0; c < chunks; ++c) {
      pack_weight(static_cast<const Other*>(p.other), p.features_last, p.m, p.n, features, c * kChunk,
                  least(features.count, (c + 1) * kChunk), first, width, tile_floats, tile);
      add_lists(tile_floats, entries, offsets + c, offsets + c + 1, step, p.rows, tile, c > 0, p.out + first, p.m,
                width);
    }
  });
}

template <typename Value, typename Other>
void grad_weight_by_lists(const msbp::Product& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const Other* x = static_cast<const Other*>(p.other);
  const Features features = Features::used(p.index, p.groups * p.k, p.n);
  const int64_t chunks = ceil_div(p.rows, kChunk), count = features.count;
  Entry* entries = scratch<Entry>(msbp::Slot::kLists, p.rows * p.k);
  int32_t* offsets = scratch<int32_t>(msbp::Slot::kOffsets, chunks * (count + 1));

  parallel(pool, chunks, [&](int64_t c) {
    int32_t* bounds = offsets + c * (count + 1);
    const int64_t begin = c * kChunk, end = least(p.rows, begin + kChunk);
    for (int64_t j = 0; j <= count; ++j) bounds[j] = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* index = p.index + i / p.r * p.k;
      for (int64_t e = 0; e < p.k; ++e) ++bounds[features.where(index[e])];
    }
    int32_t total = static_cast<int32_t>(begin * p.k);
    for (int64_t j = 0; j <= count; ++j) {
      const int32_t here = bounds[j];
      bounds[j] = total;
      total += here;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* index = p.index + i / p.r * p.k;
      for (int64_t e = 0; e < p.k; ++e)
        entries[bounds[features.where(index[e])]++] = {static_cast<int32_t>(i - begin), widen(values[i * p.k + e])};
    }
    for (int64_t j = count; j > 0; --j) bounds[j] = bounds[j - 1];
    bounds[0] = static_cast<int32_t>(begin * p.k);
  });

  const int64_t tile_floats = tile_width(least(kChunk, p.rows), p.m, 4 * pool.threads());
  parallel(pool, ceil_div(p.m, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* tile = scratch<float>(msbp::Slot::kTile, least(kChunk, p.rows) * tile_floats);
    float* result = scratch<float>(msbp::Slot::kResult, count * tile_floats);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kChunk, end = least(p.rows, begin + kChunk);
      for (int64_t i = begin; i < end; ++i) {
        const Other* row = x + i * p.m + first;
        prefetch(row + kAhead * p.m, width);
        copy_row(row, width, tile + (i - begin) * tile_floats, tile_floats);
      }
      const int32_t* bounds = offsets + c * (count + 1);
      add_lists(tile_floats, entries, bounds, bounds + 1, 1, count, tile, c > 0, result, tile_floats, tile_floats);
    }
    unpack_gradient(result, tile_floats, features, p.m, p.n, first, width, p.features_last, p.out);
  });
}

}  // namespace
