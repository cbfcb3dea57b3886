// Vectors of floats of one width, by the compilers' vector extensions: the same source serves AVX2, AVX-512, NEON and
// processors without any of them. Everything is in an unnamed namespace, because the files that include this are compiled
// once for each instruction set and must not share code across them.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef MSBP_VECTOR_FLOATS
#define MSBP_VECTOR_FLOATS 4
#endif

#define MSBP_INLINE inline __attribute__((always_inline))

namespace {

constexpr int VL = MSBP_VECTOR_FLOATS;

typedef float Floats __attribute__((vector_size(VL * 4)));
typedef int32_t Ints __attribute__((vector_size(VL * 4)));
typedef uint32_t Words __attribute__((vector_size(VL * 4)));
typedef uint16_t Halves __attribute__((vector_size(VL * 2)));

typedef float UnalignedFloats __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t UnalignedHalves __attribute__((vector_size(VL * 2), aligned(2), may_alias));

constexpr int32_t kMagnitude = 0x7fffffff;  // all bits but the sign: ordered as the magnitudes are, NaN above all
constexpr int32_t kExponent = 0x7f800000;

MSBP_INLINE Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
MSBP_INLINE void store(float* p, Floats v) { *reinterpret_cast<UnalignedFloats*>(p) = v; }
MSBP_INLINE Floats broadcast(float x) { return x - Floats{}; }
MSBP_INLINE Ints broadcast(int32_t x) { return x - Ints{}; }

// bfloat16 is the upper half of a float32.
MSBP_INLINE Floats load(const uint16_t* p) {
  const Halves h = *reinterpret_cast<const UnalignedHalves*>(p);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

MSBP_INLINE float widen(float x) { return x; }
MSBP_INLINE float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

MSBP_INLINE void narrow(float x, float* y) { *y = x; }
MSBP_INLINE void narrow(float x, uint16_t* y) {  // to nearest, ties to even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & kMagnitude) > static_cast<uint32_t>(kExponent)) {
    *y = static_cast<uint16_t>((bits >> 16) | 0x40);
  } else {
    *y = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

MSBP_INLINE int32_t magnitude_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & kMagnitude;
}
MSBP_INLINE float from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

MSBP_INLINE Floats magnitude(Floats x) { return (Floats)((Ints)x & kMagnitude); }
MSBP_INLINE Floats finite_or_zero(Floats x) {
  const Ints finite = ((Ints)x & kExponent) != broadcast(kExponent);
  return (Floats)((Ints)x & finite);
}
MSBP_INLINE float finite_or_zero(float x) { return (magnitude_bits(x) & kExponent) == kExponent ? 0.0f : x; }

MSBP_INLINE bool any_bit(Floats x) {
  const Ints bits = (Ints)x;
  int32_t any = 0;
  for (int i = 0; i < VL; ++i) any |= bits[i];
  return any != 0;
}

MSBP_INLINE float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < VL; ++i) total += x[i];
  return total;
}
MSBP_INLINE int32_t sum(Ints x) {
  int32_t total = 0;
  for (int i = 0; i < VL; ++i) total += x[i];
  return total;
}

}  // namespace
