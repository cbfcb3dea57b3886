// Products with a sparse weight, given by lists: of each output feature, which inputs it has, ascending.
//
//   times      out[i, o] = sum over the entries e of list o of values[e] in[i, inner[e]]        y = x w, and dx = g wT
//   gradient   out[e] = sum over rows of x[i, inner[e]] g[i, o], for the entries e of list o    dw at the entries
//
// Both are made on tiles of rows, turned so that a feature's entries lie together (see lists.h).
#pragma once

#include <atomic>

#include "lists.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// Whether lists are one behind the other, among so many entries. What stands in them is checked as it is used.
MSBP_INLINE bool are_lists(const int32_t* starts, int64_t lists, int64_t entries) {
  bool good = starts[0] == 0 && starts[lists] <= entries;
  for (int64_t list = 0; list < lists; ++list) good &= starts[list] <= starts[list + 1];
  return good;
}

template <typename Value, typename Other>
bool weight_times(const msbp::WeightProduct& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const Other* in = static_cast<const Other*>(p.in);
  if (!are_lists(p.starts, p.lists, p.entries)) return false;
  const int64_t chunks = ceil_div(p.inner_size, kChunk);
  std::atomic<bool> good{true};
  Entry* entries = scratch<Entry>(msbp::Slot::kLists, most(1, p.starts[p.lists]));
  int32_t* bounds = scratch<int32_t>(msbp::Slot::kOffsets, p.lists * (chunks + 1));
  constexpr int64_t kListsATask = 64;
  parallel(pool, ceil_div(p.lists, kListsATask), [&](int64_t task) {
    for (int64_t list = task * kListsATask; list < least(p.lists, (task + 1) * kListsATask); ++list) {
      int32_t* bound = bounds + list * (chunks + 1);
      int64_t chunk = 0;
      bound[0] = p.starts[list];
      for (int32_t e = p.starts[list]; e < p.starts[list + 1]; ++e) {
        const int64_t place = p.inner[e], at = p.order ? p.order[e] : e;
        if (place < chunk * kChunk || place >= p.inner_size || at < 0 || at >= p.entries) {
          good.store(false, std::memory_order_relaxed);
          break;
        }
        while (place >= (chunk + 1) * kChunk) bound[++chunk] = e;
        entries[e] = {static_cast<int32_t>(place - chunk * kChunk), widen(values[at])};
      }
      while (chunk < chunks) bound[++chunk] = p.starts[list + 1];
    }
  });

  if (!good.load()) return false;
  const int64_t tile_floats = tile_width(most(least(kChunk, p.inner_size), p.lists), p.rows, 2 * pool.threads());
  parallel(pool, ceil_div(p.rows, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.rows - first);
    float* tile = scratch<float>(msbp::Slot::kTile, least(kChunk, p.inner_size) * tile_floats);
    float* result = scratch<float>(msbp::Slot::kResult, p.lists * tile_floats);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kChunk, length = least(kChunk, p.inner_size - begin);
      if (width < tile_floats) std::memset(tile, 0, length * tile_floats * sizeof(float));
      transpose(in + first * p.inner_size + begin, p.inner_size, width, length, tile, tile_floats);
      add_lists(tile_floats, entries, bounds + c, bounds + c + 1, chunks + 1, p.lists, tile, c > 0, result, tile_floats,
                tile_floats);
    }
    transpose(result, tile_floats, p.lists, width, p.out + first * p.lists, p.lists);
  });
  return true;
}

#ifdef __AVX2__
MSBP_INLINE float sum_of_eight(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

// The sum of a vector's lanes, by halves.
MSBP_INLINE float sum_by_halves(Floats x) {
#if defined(__AVX2__) && MSBP_VECTOR_FLOATS == 16
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof x);
  return sum_of_eight(halves[0] + halves[1]);
#elif defined(__AVX2__) && MSBP_VECTOR_FLOATS == 8
  return sum_of_eight((__m256)x);
#else
  float lane[VL];
  store(lane, x);
  for (int half = VL / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}

// The product of a row that is held in registers and another one.
MSBP_INLINE float times_row(const Floats (&row)[kTileVectors], const float* other) {
  Floats even{}, odd{};
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; v += 2) {
    even += row[v] * load(other + v * VL);
    odd += row[v + 1] * load(other + (v + 1) * VL);
  }
  return sum_by_halves(even + odd);
}

template <typename Left, typename Right>
bool weight_gradient(const msbp::WeightGradient& p, msbp::Pool& pool) {
  constexpr int V = kTileVectors;
  const Left* x = static_cast<const Left*>(p.x);
  const Right* g = static_cast<const Right*>(p.g);
  if (!are_lists(p.starts, p.n, p.entries)) return false;
  for (int64_t e = 0; e < p.starts[p.n]; ++e)
    if (p.inner[e] < 0 || p.inner[e] >= p.m) return false;
  const int64_t tiles = ceil_div(p.rows, kTileFloats);
  float* turned_x = scratch<float>(msbp::Slot::kValues, tiles * p.m * kTileFloats);
  float* turned_g = scratch<float>(msbp::Slot::kPartials, tiles * p.n * kTileFloats);
  constexpr int64_t kColumnsATask = 256;
  const int64_t of_x = ceil_div(p.m, kColumnsATask), parts = of_x + ceil_div(p.n, kColumnsATask);
  parallel(pool, tiles * parts, [&](int64_t task) {
    const int64_t tile = task / parts, part = task % parts;
    const int64_t first = tile * kTileFloats, width = least(kTileFloats, p.rows - first);
    const auto turn = [&](const auto* array, int64_t size, int64_t begin, float* out) {
      const int64_t length = least(kColumnsATask, size - begin);
      out += (tile * size + begin) * kTileFloats;
      if (width < kTileFloats) std::memset(out, 0, length * kTileFloats * sizeof(float));
      transpose(array + first * size + begin, size, width, length, out, kTileFloats);
    };
    part < of_x ? turn(x, p.m, part * kColumnsATask, turned_x) : turn(g, p.n, (part - of_x) * kColumnsATask, turned_g);
  });
  // Lists in ranges of about as many entries, whatever the number of threads.
  constexpr int64_t kEntriesATask = 4096;
  const int64_t entries = p.starts[p.n];
  parallel(pool, ceil_div(entries, kEntriesATask), [&](int64_t task) {
    const int64_t begin = task * kEntriesATask, end = least(entries, begin + kEntriesATask);
    int64_t low = 0, high = p.n;  // the list that `begin` is in
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.starts[middle] <= begin ? low : high) = middle;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* tile_x = turned_x + tile * p.m * kTileFloats;
      const float* tile_g = turned_g + tile * p.n * kTileFloats;
      for (int64_t list = low, e = begin; e < end; ++list) {
        Floats row[V];
        for (int v = 0; v < V; ++v) row[v] = load(tile_g + list * kTileFloats + v * VL);
        for (const int64_t last = least(end, p.starts[list + 1]); e < last; ++e) {
          const float* other = tile_x + static_cast<int64_t>(p.inner[e]) * kTileFloats;
          const float total = times_row(row, other);
          p.out[e] = tile == 0 ? total : p.out[e] + total;
        }
      }
    }
  });
  for (int64_t e = entries; e < p.entries; ++e) p.out[e] = 0;  // there to make patterns equally long
  return true;
}

}  // namespace
