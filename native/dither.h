// Making most entries of a gradient 0 by chance, without bias; and what is asked of its rows before.
//
//   dithered    step floor(g / step + v)                               v uniform in (0, 1)
//   pruned      g where |g| >= step, else step sign(g) if v < |g| / step, else 0
//
// Nothing here is a product that a sum follows (XLA may round such a pair once, or twice), so that the bits are those of
// the reference.
#pragma once

#include "noise.h"
#include "parallel.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

MSBP_INLINE Floats chosen(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }

MSBP_INLINE Floats rounded_down(Floats x) {
#ifdef __AVX2__
#if defined(__AVX512F__) && MSBP_VECTOR_FLOATS == 16
  return (Floats)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif MSBP_VECTOR_FLOATS == 8
  return (Floats)_mm256_floor_ps((__m256)x);
#endif
#endif
  const Ints small = magnitude(x) < broadcast(0x1p23f);  // larger ones are whole; and NaN stays
  Floats whole = __builtin_convertvector(__builtin_convertvector(chosen(small, x, Floats{}), Ints), Floats);
  whole = chosen(whole > x, whole - 1.0f, whole);
  return chosen(small, whole, x);
}

MSBP_INLINE Floats dithered(Floats g, Floats step, Floats noise) { return rounded_down(g / step + noise); }

MSBP_INLINE Floats pruned(Floats g, Floats step, Floats noise) {
  const Floats share = magnitude(g) / step;
  const Floats drawn = chosen(noise < share, (Floats)(((Ints)g & ~broadcast(kMagnitude)) | (Ints)step), Floats{});
  return chosen(share < 1.0f, drawn, g);  // NaN is not less
}

MSBP_INLINE Ints not_zero(Floats x) { return ((Ints)x & kMagnitude) != 0; }

MSBP_INLINE void store_as(float* out, Floats x) { store(out, x); }
MSBP_INLINE void store_as(uint16_t* out, Floats x) {
  for (int i = 0; i < VL; ++i) narrow(x[i], out + i);
}

constexpr int64_t kDitherRows = 16;  // a task

template <typename Value>
void dither(const msbp::Dither& d, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(d.values);
  Value* out = static_cast<Value*>(d.out);
  const bool whole = !(*d.step > 0);
  const Floats step = broadcast(*d.step);
  parallel(pool, ceil_div(d.rows, kDitherRows), [&](int64_t task) {
    for (int64_t i = task * kDitherRows; i < least(d.rows, (task + 1) * kDitherRows); ++i) {
      const Value* row = values + i * d.n;
      Value* place = out + i * d.n;
      const RowNoise noise(d.key, d.row_numbers[i]);
      Ints kept{};
      Words columns = first_columns();
      const auto of = [&](Floats g) {
        if (whole) return g;
        const Floats v = noise.at(columns);
        if (d.prunes) return pruned(g, step, v);
        const Floats level = dithered(g, step, v);
        return sizeof(Value) == sizeof(float) ? level * step : level;  // levels are exact in 16 bits, multiples are not
      };
      int64_t j = 0;
      for (; j + VL <= d.n; j += VL) {
        const Floats found = of(load(row + j));
        columns += kNextColumns;
        kept -= not_zero(found);
        store_as(place + j, found);
      }
      if (j < d.n) {
        Floats last{};
        for (int64_t q = j; q < d.n; ++q) last[q - j] = widen(row[q]);
        const Floats found = of(last);
        for (int64_t q = j; q < d.n; ++q) {
          kept[q - j] -= not_zero(found)[q - j];
          narrow(found[q - j], place + q);
        }
      }
      d.kept[i] = static_cast<float>(sum(kept));
    }
  });
}

// For each row: how many entries are finite (0 if the row takes no part), their mean, and the norm of what they differ
// from it by. Equal entries have their value for a mean, and 0, exactly; squares are of numbers around 1.
template <typename Value>
void row_moments(const msbp::OfRows& m, msbp::Pool& pool) {
  const Value* values = static_cast<const Value*>(m.values);
  parallel(pool, ceil_div(m.rows, kDitherRows), [&](int64_t task) {
    for (int64_t i = task * kDitherRows; i < least(m.rows, (task + 1) * kDitherRows); ++i) {
      const Value* row = values + i * m.n;
      const auto over_row = [&](const auto& body) {
        int64_t j = 0;
        for (; j + VL <= m.n; j += VL) body(load(row + j), ~Ints{});
        if (j == m.n) return;
        Floats last{};
        Ints there{};
        for (int64_t q = j; q < m.n; ++q) last[q - j] = widen(row[q]), there[q - j] = -1;
        body(last, there);
      };
      const Floats first = broadcast(finite_or_zero(widen(row[0])));
      Floats total{}, squares{}, largest{};
      Ints count{}, live{};
      over_row([&](Floats x, Ints there) {
        const Ints takes = (((Ints)x & kExponent) != broadcast(kExponent)) & there;
        const Floats off = (Floats)((Ints)(x - first) & takes);
        total += off;
        largest = chosen(magnitude(off) > largest, magnitude(off), largest);
        count -= takes;
        live |= not_zero(x) & there;
      });
      const int32_t finite = sum(count);
      const float mean = first[0] + (finite ? sum(total) / static_cast<float>(finite) : 0.0f);
      const Floats middle = broadcast(mean);
      float size = 0;
      for (int q = 0; q < VL; ++q) size = largest[q] > size ? largest[q] : size;
      const float per_size = size > 1e-37f ? 1 / size : 0;
      over_row([&](Floats x, Ints there) {
        const Ints takes = (((Ints)x & kExponent) != broadcast(kExponent)) & there;
        const Floats off = (Floats)((Ints)(x - middle) & takes) * per_size;
        squares += off * off;
      });
      float* out = m.out + 3 * i;
      out[0] = any_bit((Floats)live) ? static_cast<float>(finite) : 0.0f;
      out[1] = mean;
      out[2] = size * __builtin_sqrtf(sum(squares));
    }
  });
}

}  // namespace
