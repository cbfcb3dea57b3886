// The noise of dithering: one number for each (key, row, column), by counting, so that every entry can be asked for by
// itself, in any order and on any processor. The same bits as msbp_jax/kernels/entries/noise.py.
#pragma once

#include "simd.h"

namespace {

constexpr uint32_t kColumnStep = 0x9e3779b1u, kFirst = 0x7feb352du, kSecond = 0x846ca68bu;

MSBP_INLINE Words words(uint32_t x) { return x - Words{}; }

template <typename Word>
MSBP_INLINE Word mixed(Word x) {
  x = (x ^ (x >> 16)) * kFirst;
  x = (x ^ (x >> 15)) * kSecond;
  return x ^ (x >> 16);
}

// The first columns, and how far on the next ones are, times kColumnStep.
MSBP_INLINE Words first_columns() {
  Words lane;
  for (int i = 0; i < VL; ++i) lane[i] = i * kColumnStep;
  return lane;
}
constexpr uint32_t kNextColumns = VL * kColumnStep;

// What the entries of a row have in common.
struct RowNoise {
  uint32_t start, twist;

  RowNoise(const uint32_t* key, uint32_t row) {
    start = mixed(mixed(row ^ key[0]) ^ key[1]);
    twist = mixed((start + kColumnStep) ^ key[0]);
  }

  // Uniform on the odd multiples of 2^-24 in (0, 1), for a vector of columns times kColumnStep.
  MSBP_INLINE Floats at(Words stepped) const {
    const Words x = mixed((stepped + start) ^ twist) >> 9;
    return __builtin_convertvector((Ints)x, Floats) * 0x1p-23f + 0x1p-24f;
  }
};

}  // namespace
