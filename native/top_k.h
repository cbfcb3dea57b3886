// The exact k largest magnitudes of one row, ties to the lower index, by counting how many reach a threshold.
//
// Magnitudes are compared as integers, which orders them as floats and puts NaN above all. A threshold guessed from the
// mean is moved until between k and a few more entries reach it; these candidates are packed together, and a bisection
// over the candidates alone finds the exact one. Each count is one pass over a row that lies in the first-level cache.
#pragma once

#include "parallel.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX2__
struct PackTable {
  alignas(32) int32_t lanes[256][8];
  constexpr PackTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][kept++] = lane;
      while (kept < 8) lanes[mask][kept++] = 0;
    }
  }
};
constexpr PackTable kPack;
#endif

// How many entries of x[0, n) reach `threshold` (> 0). With AVX2, `reached` gets a bit for each that does, 32 a word,
// so that pack_reaching need not look at the others again.
MSBP_INLINE int64_t count_reaching(const float* x, int64_t n, int32_t threshold, uint32_t* reached) {
  int64_t total = 0, j = 0;
#ifdef __AVX2__
  const __m256i below = _mm256_set1_epi32(threshold - 1), magnitudes = _mm256_set1_epi32(kMagnitude);
  const auto mask = [&](const float* at) -> uint32_t {
    const __m256i v = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), magnitudes);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(v, below))));
  };
  for (; j + 32 <= n; j += 32) {
    const uint32_t word = mask(x + j) | mask(x + j + 8) << 8 | mask(x + j + 16) << 16 | mask(x + j + 24) << 24;
    reached[j / 32] = word;
    total += __builtin_popcount(word);
  }
  if (j < n) {
    uint32_t word = 0;
    for (int64_t i = j; i < n; ++i) word |= static_cast<uint32_t>(magnitude_bits(x[i]) >= threshold) << (i - j);
    reached[j / 32] = word;
    total += __builtin_popcount(word);
  }
#else
  (void)reached;
  const Ints below = broadcast(threshold - 1);
  Ints a{}, b{};
  for (; j + 2 * VL <= n; j += 2 * VL) {
    a -= ((Ints)load(x + j) & kMagnitude) > below;
    b -= ((Ints)load(x + j + VL) & kMagnitude) > below;
  }
  total = sum(a + b);
  for (; j < n; ++j) total += magnitude_bits(x[j]) >= threshold;
#endif
  return total;
}

// Pack the magnitudes (as bits) that reach `threshold`, and where they stand; both need 16 places more than are found.
MSBP_INLINE int64_t pack_reaching(const float* x, int64_t n, int32_t threshold, const uint32_t* reached, int32_t* bits,
                                  int32_t* where) {
  int64_t found = 0;
#ifdef __AVX2__
  (void)threshold;
  for (int64_t first = 0; first < n; first += 32) {
    uint32_t word = reached[first / 32];
    const int64_t end = found + __builtin_popcount(word);
    // Most words have few bits: write four without a test, and let the next word overwrite those that do not count.
    do {
      for (int q = 0; q < 4; ++q) {
        where[found + q] = static_cast<int32_t>(first + _tzcnt_u32(word));
        word &= word - 1;
      }
      found += 4;
    } while (word);
    found = end;
  }
  for (int64_t c = 0; c < found; ++c) bits[c] = magnitude_bits(x[where[c]]);
#else
  (void)reached;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t v = magnitude_bits(x[j]);
    bits[found] = v;
    where[found] = static_cast<int32_t>(j);
    found += v >= threshold;
  }
#endif
  return found;
}

// Pack the places whose bits reach `threshold`, in place.
MSBP_INLINE int64_t pack_places(const int32_t* bits, int64_t n, int32_t threshold, int32_t* where) {
  int64_t found = 0, c = 0;
#ifdef __AVX2__
  const __m256i below = _mm256_set1_epi32(threshold - 1);
  for (; c + 8 <= n; c += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + c));
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(v, below)));
    const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPack.lanes[mask]));
    const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(where + c));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(where + found), _mm256_permutevar8x32_epi32(places, lanes));
    found += __builtin_popcount(mask);
  }
#endif
  for (; c < n; ++c) {
    where[found] = where[c];
    found += bits[c] >= threshold;
  }
  return found;
}

// How many of the packed magnitudes reach `threshold`; they are followed by zeros up to a multiple of VL.
MSBP_INLINE int64_t count_packed(const int32_t* bits, int64_t n, int32_t threshold) {
  const Ints below = broadcast(threshold - 1);
  Ints total{};
  for (int64_t c = 0; c < n; c += VL) total -= (Ints)load(reinterpret_cast<const float*>(bits + c)) > below;
  return sum(total);
}

MSBP_INLINE int32_t largest_packed(const int32_t* bits, int64_t n) {
  Ints most{};
  for (int64_t c = 0; c < n; c += VL) {
    const Ints x = (Ints)load(reinterpret_cast<const float*>(bits + c));
    most = x > most ? x : most;
  }
  int32_t largest = 0;
  for (int lane = 0; lane < VL; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

// What earlier rows teach: the threshold over the mean magnitude.
struct Guess {
  float ratio = 0;

  float threshold(float mean) const { return (ratio > 0 ? 0.94f * ratio : 2.0f) * mean; }
  void learn(float exact, float mean) {
    const float seen = exact / mean;
    if (seen > 0 && seen < 1e6f) ratio = ratio > 0 ? ratio + 0.2f * (seen - ratio) : seen;
  }
};

// Write the columns of the k largest magnitudes of x[0, n) to `index`, ascending. `mean` is a hint. `bits` and `where`
// have n + 16 places; the marks of count_reaching lie in `bits` until it is filled.
inline void top_k(const float* x, int64_t n, int64_t k, float mean, Guess& guess, int32_t* bits, int32_t* where,
                  int32_t* index) {
  if (k >= n) {
    for (int64_t j = 0; j < n; ++j) index[j] = static_cast<int32_t>(j);
    return;
  }
  uint32_t* marks = reinterpret_cast<uint32_t*>(bits);
  uint32_t* marks_of_low = marks + (n + 31) / 32;
  const int64_t enough = k + k / 2 + 16;
  int64_t low = 0, high = int64_t{kMagnitude} + 1;  // counts: low >= k, high < k
  int64_t reach_low = n;
  const int32_t first = magnitude_bits(guess.threshold(mean));
  int64_t threshold = first < kExponent ? first : 0x3f800000;
  for (int64_t step = int64_t{1} << 20; reach_low > enough && high - low > 1; step = least(4 * step, kMagnitude)) {
    if (threshold <= low || threshold >= high) threshold = low + (high - low) / 2;
    const int64_t reach = count_reaching(x, n, static_cast<int32_t>(threshold), marks);
    if (reach >= k) {
      low = threshold, reach_low = reach;
      uint32_t* const accepted = marks;
      marks = marks_of_low, marks_of_low = accepted;
      threshold += step;
    } else {
      high = threshold;
      threshold -= step;
    }
    if (low > 0 && high <= kMagnitude) threshold = low + (high - low) / 2;
  }
  // low may be 0, which every entry reaches; counting needs a threshold of at least 1.
  int64_t found;
  if (low > 0) {
    found = pack_reaching(x, n, static_cast<int32_t>(low), marks_of_low, bits, where);
  } else {
    found = n;
    for (int64_t j = 0; j < n; ++j) bits[j] = magnitude_bits(x[j]), where[j] = static_cast<int32_t>(j);
  }
  for (int64_t c = found; c < found + VL; ++c) bits[c] = 0;
  int64_t reach = found;
  if (reach != k) high = least(high, int64_t{largest_packed(bits, found)} + 1);
  while (reach != k && high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t reaches = count_packed(bits, found, static_cast<int32_t>(middle));
    if (reaches >= k) {
      low = middle, reach = reaches;
    } else {
      high = middle;
    }
  }
  const int32_t exact = static_cast<int32_t>(low);
  if (exact < kExponent) guess.learn(from_bits(exact), mean);
  if (reach == k) {
    pack_places(bits, found, exact, where);
    std::memcpy(index, where, k * sizeof(int32_t));
    return;
  }
  // More than k reach the exact threshold: all above it, and the first of those that equal it.
  int64_t kept = 0, ties = k;
  for (int64_t c = 0; c < found; ++c) ties -= bits[c] > exact;
  for (int64_t c = 0; c < found; ++c) {
    if (bits[c] > exact || (bits[c] == exact && ties-- > 0)) index[kept++] = where[c];
  }
}

}  // namespace
