// Products for a cotangent any of whose entries may be 0: those that are not are listed, and a list is multiplied with a
// dense tile (see lists.h).
#pragma once

#include <atomic>

#include "lists.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

MSBP_INLINE bool is_zero(float x) { return magnitude_bits(x) == 0; }
MSBP_INLINE bool is_zero(uint16_t x) { return (x & 0x7fff) == 0; }

constexpr int64_t kSpare = 8;  // entries that may be written behind a list, and are none

// Writes the entries of row[0, count) that are not 0, in an order that the values alone decide; returns their end.
template <typename Value>
MSBP_INLINE Entry* list_entries(const Value* row, int64_t count, float scale, Entry* out) {
  int64_t j = 0;
#ifdef __AVX2__
#if defined(__AVX512F__) && MSBP_VECTOR_FLOATS == 16
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; j + VL <= count; j += VL) {
    const Floats x = load(row + j);
    const uint32_t kept = _mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32(kMagnitude));
    const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(j)));
    const __m512i value = (__m512i)(x * broadcast(scale));
    // Pairs of place and value; unpacking takes two of four, in each quarter of the vector.
    const uint32_t halves[] = {0x3333, 0xcccc};
    constexpr __mmask16 kAll = 0xffff;
    for (const uint32_t half : halves) {
      const __m512i pairs = half == halves[0] ? _mm512_maskz_unpacklo_epi32(kAll, place, value)
                                              : _mm512_maskz_unpackhi_epi32(kAll, place, value);
      const __mmask8 mask = static_cast<__mmask8>(_pext_u32(kept, half));
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(mask, pairs));
      out += __builtin_popcount(mask);
    }
  }
#endif
#endif
  for (; j < count; ++j) {
    *out = {static_cast<int32_t>(j), scale * widen(row[j])};
    out += !is_zero(row[j]);
  }
  return out;
}

// Lists that tasks make by themselves and then put one behind the other, in whatever order they come: where a list lies
// does not show in what it sums up to. Memory that no list reaches is never touched.
class Lists {
 public:
  Lists(int64_t most_entries, int64_t lists)
      : entries_(scratch<Entry>(msbp::Slot::kLists, most(1, most_entries))),
        starts_(scratch<int32_t>(msbp::Slot::kOffsets, 2 * lists)),
        ends_(starts_ + lists) {}

  // A place for so many entries.
  int64_t place(int64_t count) { return next_.fetch_add(count, std::memory_order_relaxed); }
  void set(int64_t list, int64_t start, int64_t end) {
    starts_[list] = static_cast<int32_t>(start);
    ends_[list] = static_cast<int32_t>(end);
  }
  Entry* entries() const { return entries_; }
  const int32_t* starts() const { return starts_; }
  const int32_t* ends() const { return ends_; }

 private:
  Entry* entries_;
  int32_t* starts_;
  int32_t* ends_;
  std::atomic<int64_t> next_{0};
};

constexpr int64_t kListRows = 16;  // a task that makes lists

template <typename Value, typename Other>
void entries_grad_input(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const int64_t chunks = ceil_div(p.n, kChunk);
  Lists lists(p.rows * p.n, p.rows * chunks);  // of each row, chunk after chunk
  parallel(pool, ceil_div(p.rows, kListRows), [&](int64_t task) {
    const int64_t begin = task * kListRows, end = least(p.rows, begin + kListRows);
    Entry* own = scratch<Entry>(msbp::Slot::kValues, kListRows * p.n + kSpare);
    int64_t* ends = scratch<int64_t>(msbp::Slot::kKept, kListRows * chunks);
    Entry* last = own;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = c * kChunk;
        last = list_entries(values + i * p.n + from, least(kChunk, p.n - from), *p.weight, last);
        ends[(i - begin) * chunks + c] = last - own;
      }
    const int64_t place = lists.place(last - own);
    std::memcpy(lists.entries() + place, own, (last - own) * sizeof(Entry));
    for (int64_t list = 0; list < (end - begin) * chunks; ++list)
      lists.set(begin * chunks + list, place + (list ? ends[list - 1] : 0), place + ends[list]);
  });

  const Features all{p.n, nullptr, nullptr};
  const int64_t tile_floats = tile_width(least(kChunk, p.n), p.m, 4 * pool.threads());
  parallel(pool, ceil_div(p.m, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* tile = scratch<float>(msbp::Slot::kTile, least(kChunk, p.n) * tile_floats);
    for (int64_t c = 0; c < chunks; ++c) {
      pack_weight(static_cast<const Other*>(p.other), p.features_last, p.m, p.n, all, c * kChunk,
                  least(p.n, (c + 1) * kChunk), first, width, tile_floats, tile);
      add_lists(tile_floats, lists.entries(), lists.starts() + c, lists.ends() + c, chunks, p.rows, tile, c > 0,
                p.out + first, p.m, width);
    }
  });
}

constexpr int64_t kListColumns = 256;  // a task that makes lists of columns

template <typename Value, typename Other>
void entries_grad_weight(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const Other* x = static_cast<const Other*>(p.other);
  const int64_t chunks = ceil_div(p.rows, kChunk), blocks = ceil_div(p.n, kListColumns);
  Lists lists(p.rows * p.n, chunks * p.n);  // of each chunk of rows, column by column
  parallel(pool, chunks * blocks, [&](int64_t task) {
    const int64_t c = task / blocks, from = task % blocks * kListColumns, width = least(kListColumns, p.n - from);
    const int64_t begin = c * kChunk, rows = least(kChunk, p.rows - begin);
    Entry* own = scratch<Entry>(msbp::Slot::kValues, rows * width + kSpare);  // row by row
    int64_t ends[kChunk], next[kListColumns] = {};
    Entry* last = own;
    for (int64_t i = 0; i < rows; ++i) {
      last = list_entries(values + (begin + i) * p.n + from, width, *p.weight, last);
      ends[i] = last - own;
    }
    for (const Entry* e = own; e != last; ++e) ++next[e->row];
    int64_t place = lists.place(last - own);
    for (int64_t j = 0; j < width; ++j) {
      const int64_t count = next[j];
      lists.set(c * p.n + from + j, place, place + count);
      next[j] = place;
      place += count;
    }
    const Entry* e = own;
    for (int64_t i = 0; i < rows; ++i)
      for (; e != own + ends[i]; ++e) lists.entries()[next[e->row]++] = {static_cast<int32_t>(i), e->value};
  });

  const Features all{p.n, nullptr, nullptr};
  const int64_t tile_floats = tile_width(least(kChunk, p.rows), p.m, 4 * pool.threads());
  parallel(pool, ceil_div(p.m, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* tile = scratch<float>(msbp::Slot::kTile, least(kChunk, p.rows) * tile_floats);
    // Rows of dw that lie together are added up where they belong; else in a tile, which is turned at the end.
    float* result = p.features_last ? scratch<float>(msbp::Slot::kResult, p.n * tile_floats) : p.out + first;
    const int64_t stride = p.features_last ? tile_floats : p.m;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kChunk, end = least(p.rows, begin + kChunk);
      for (int64_t i = begin; i < end; ++i) {
        const Other* row = x + i * p.m + first;
        prefetch(row + kAhead * p.m, width);
        copy_row(row, width, tile + (i - begin) * tile_floats, tile_floats);
      }
      add_lists(tile_floats, lists.entries(), lists.starts() + c * p.n, lists.ends() + c * p.n, 1, p.n, tile, c > 0,
                result, stride, p.features_last ? tile_floats : width);
    }
    if (p.features_last)
      unpack_gradient(result, tile_floats, all, p.m, p.n, first, width, p.features_last, p.out);
  });
}

}  // namespace
