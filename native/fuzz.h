// What the fuzzers share: threads, random arrays in blocks of the exact size, and what counts as near.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

using namespace msbp;

class Threads final : public Pool {
 public:
  explicit Threads(int64_t count) : count_(count) {}
  int64_t threads() const override { return count_; }
  void run(int64_t tasks, void (*task)(void*, int64_t), void* context) override {
    std::atomic<int64_t> next{0};
    auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(context, i);
    };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < count_; ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
  }

 private:
  int64_t count_;
};

std::mt19937 random_bits(0);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// A heap block of exactly `count` entries, so that sanitizers see an access one byte too far.
template <typename T>
using Block = std::unique_ptr<T[]>;

struct Array {
  std::vector<float> exact;  // what the kernel is to see
  Block<float> floats;
  Block<uint16_t> halves;
  const void* data() const { return halves ? static_cast<const void*>(halves.get()) : floats.get(); }

  Array(int64_t count, bool bfloat16, int kind, int64_t width = 0) : exact(count) {
    std::normal_distribution<float> normal;
    for (float& x : exact) {
      x = normal(random_bits) * std::exp(normal(random_bits));
      if (kind == 1) x = static_cast<float>(between(-2, 2));  // ties
      if (kind == 2 && between(0, 50) == 0) x = between(0, 1) ? INFINITY : NAN;
      if (bfloat16) x = from_bfloat16(to_bfloat16(x));
    }
    for (int64_t i = 0; width > 0 && i < count / width; ++i)  // rows that take no part
      if (between(0, 3) == 0) std::fill_n(exact.begin() + i * width, width, between(0, 1) ? 0.0f : -0.0f);
    if (bfloat16) {
      halves.reset(new uint16_t[count]);
      std::transform(exact.begin(), exact.end(), halves.get(), to_bfloat16);
    } else {
      floats.reset(new float[count]);
      std::copy(exact.begin(), exact.end(), floats.get());
    }
  }
};

int failures = 0;

bool near(double a, double b, double scale) {
  return (std::isnan(a) && std::isnan(b)) || a == b || std::fabs(a - b) <= 2e-5 * scale + 1e-30;
}

}  // namespace
