// Products for a cotangent any of whose entries may be 0: those that are not are listed, and a list is multiplied with a
// dense tile (see lists.h).
#pragma once

#include "lists.h"

namespace {

MSBP_INLINE bool is_zero(float x) { return magnitude_bits(x) == 0; }
MSBP_INLINE bool is_zero(uint16_t x) { return (x & 0x7fff) == 0; }

// Appends the entries of row[0, count) that are not 0, numbered from `first`; there is room for `count`.
template <typename Value>
MSBP_INLINE Entry* append(const Value* row, int64_t count, int32_t first, float scale, Entry* out) {
  for (int64_t j = 0; j < count; ++j) {
    *out = {first + static_cast<int32_t>(j), scale * widen(row[j])};
    out += !is_zero(row[j]);
  }
  return out;
}

template <typename Value>
MSBP_INLINE int64_t count_of(const Value* row, int64_t count) {
  Ints kept{};
  int64_t j = 0;
  for (; j + VL <= count; j += VL) kept -= ((Ints)load(row + j) & kMagnitude) != 0;
  int64_t total = sum(kept);
  for (; j < count; ++j) total += !is_zero(row[j]);
  return total;
}

constexpr int64_t kListRows = 16;  // a task that makes lists

template <typename Value, typename Other>
void entries_grad_input(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const int64_t chunks = ceil_div(p.n, kChunk), lists = p.rows * chunks;
  const auto length = [&](int64_t chunk) { return least(kChunk, p.n - chunk * kChunk); };
  int32_t* offsets = scratch<int32_t>(msbp::Slot::kOffsets, lists + 1);  // in each row, chunk after chunk
  const auto over_rows = [&](const auto& body) {
    parallel(pool, ceil_div(p.rows, kListRows), [&](int64_t task) {
      for (int64_t i = task * kListRows; i < least(p.rows, (task + 1) * kListRows); ++i)
        for (int64_t c = 0; c < chunks; ++c) body(values + i * p.n + c * kChunk, c, i * chunks + c);
    });
  };
  over_rows([&](const Value* row, int64_t c, int64_t list) {
    offsets[list + 1] = static_cast<int32_t>(count_of(row, length(c)));
  });
  offsets[0] = 0;
  for (int64_t list = 0; list < lists; ++list) offsets[list + 1] += offsets[list];
  // One more than there are: what is no entry is written too, and then written over.
  Entry* entries = scratch<Entry>(msbp::Slot::kLists, offsets[lists] + 1);
  over_rows([&](const Value* row, int64_t c, int64_t list) {
    Entry own[kChunk + 1];
    append(row, length(c), 0, *p.weight, own);
    std::memcpy(entries + offsets[list], own, (offsets[list + 1] - offsets[list]) * sizeof(Entry));
  });

  const Features all{p.n, nullptr, nullptr};
  const int64_t tile_floats = tile_width(least(kChunk, p.n), p.m, 4 * pool.threads());
  parallel(pool, ceil_div(p.m, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* tile = scratch<float>(msbp::Slot::kTile, least(kChunk, p.n) * tile_floats);
    for (int64_t c = 0; c < chunks; ++c) {
      pack_weight(static_cast<const Other*>(p.other), p.features_last, p.m, p.n, all, c * kChunk,
                  c * kChunk + length(c), first, width, tile_floats, tile);
      add_lists(tile_floats, entries, offsets + c, offsets + c + 1, chunks, p.rows, tile, c > 0, p.out + first, p.m,
                width);
    }
  });
}

constexpr int64_t kListColumns = 16 * 16;  // a task that makes lists of columns

template <typename Value, typename Other>
void entries_grad_weight(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(p.values);
  const Other* x = static_cast<const Other*>(p.other);
  const int64_t chunks = ceil_div(p.rows, kChunk), blocks = ceil_div(p.n, kListColumns), lists = chunks * p.n;
  int32_t* offsets = scratch<int32_t>(msbp::Slot::kOffsets, 2 * (lists + 1));  // in each chunk of rows, column by column
  int32_t* next = offsets + lists + 1;
  const auto over_blocks = [&](const auto& body) {
    parallel(pool, chunks * blocks, [&](int64_t task) {
      const int64_t c = task / blocks, from = task % blocks * kListColumns;
      body(c * kChunk, least(p.rows, (c + 1) * kChunk), from, least(kListColumns, p.n - from), c * p.n + from);
    });
  };
  over_blocks([&](int64_t begin, int64_t end, int64_t from, int64_t width, int64_t list) {
    Ints kept[kListColumns / VL] = {};
    int32_t* count = offsets + list + 1;
    const int64_t whole = width / VL;
    for (int64_t j = whole * VL; j < width; ++j) count[j] = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Value* row = values + i * p.n + from;
      for (int64_t v = 0; v < whole; ++v) kept[v] -= ((Ints)load(row + v * VL) & kMagnitude) != 0;
      for (int64_t j = whole * VL; j < width; ++j) count[j] += !is_zero(row[j]);
    }
    std::memcpy(count, kept, whole * VL * sizeof(int32_t));
  });
  offsets[0] = 0;
  for (int64_t list = 0; list < lists; ++list) {
    offsets[list + 1] += offsets[list];
    next[list] = offsets[list];
  }
  Entry* entries = scratch<Entry>(msbp::Slot::kLists, most(1, offsets[lists]));
  over_blocks([&](int64_t begin, int64_t end, int64_t from, int64_t width, int64_t list) {
    for (int64_t i = begin; i < end; ++i) {
      Entry own[kListColumns + 1];
      const Entry* last = append(values + i * p.n + from, width, 0, *p.weight, own);
      for (const Entry* e = own; e != last; ++e)
        entries[next[list + e->row]++] = {static_cast<int32_t>(i - begin), e->value};
    }
  });

  const Features all{p.n, nullptr, nullptr};
  const int64_t tile_floats = tile_width(least(kChunk, p.rows), p.m, 4 * pool.threads());
  parallel(pool, ceil_div(p.m, tile_floats), [&](int64_t task) {
    const int64_t first = task * tile_floats, width = least(tile_floats, p.m - first);
    float* tile = scratch<float>(msbp::Slot::kTile, least(kChunk, p.rows) * tile_floats);
    float* result = scratch<float>(msbp::Slot::kResult, p.n * tile_floats);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kChunk, end = least(p.rows, begin + kChunk);
      for (int64_t i = begin; i < end; ++i) {
        const Other* row = x + i * p.m + first;
        prefetch(row + kAhead * p.m, width);
        copy_row(row, width, tile + (i - begin) * tile_floats, tile_floats);
      }
      add_lists(tile_floats, entries, offsets + c * p.n, offsets + c * p.n + 1, 1, p.n, tile, c > 0, result,
                tile_floats, tile_floats);
    }
    unpack_gradient(result, tile_floats, all, p.m, p.n, first, width, p.features_last, p.out);
  });
}

}  // namespace
