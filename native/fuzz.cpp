// Every kernel on random shapes against loops that are plainly right, on real threads and in blocks of the exact size.
//
// It needs neither Python nor XLA, so that it runs whole under the sanitizers and on other processors:
//   c++ -std=c++17 -O1 -g -fsanitize=address,undefined fuzz.cpp scratch.cpp kernels.cpp -o fuzz -pthread && ./fuzz 300
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

void demand(bool holds, const char* what, const Kernels& kernels, const Select& s) {
  if (holds) return;
  ++failures;
  std::printf("%s: %s is off at rows %ld n %ld k %ld r %ld, bfloat16 %d, memory %d, by slot %d\n", kernels.name, what,
              static_cast<long>(s.rows), static_cast<long>(s.n), static_cast<long>(s.k), static_cast<long>(s.r),
              s.bfloat16, s.memory != nullptr, s.by_slot);
}

double magnitude(float x) { return std::isnan(x) ? INFINITY : std::fabs(static_cast<double>(x)); }

// Whether these are the k best columns of a group, unless scores are too close to tell.
bool chosen_well(const std::vector<double>& scores, const int32_t* index, int64_t k, bool exact) {
  std::vector<bool> kept(scores.size());
  double worst = INFINITY, best = -1;
  for (int64_t e = 0; e < k; ++e) {
    if (index[e] < 0 || index[e] >= static_cast<int64_t>(scores.size()) || kept[index[e]]) return false;
    if (e > 0 && index[e] <= index[e - 1]) return false;
    kept[index[e]] = true;
    worst = std::min(worst, scores[index[e]]);
  }
  for (size_t j = 0; j < scores.size(); ++j)
    if (!kept[j]) best = std::max(best, scores[j]);
  if (best > worst * (exact ? 1 : 1 + 1e-5)) return false;
  if (exact && best == worst) {  // ties go to the lower index
    int64_t last = -1;
    for (size_t j = 0; j < scores.size(); ++j)
      if (kept[j] && scores[j] == worst) last = static_cast<int64_t>(j);
    for (int64_t j = 0; j < last; ++j)
      if (!kept[j] && scores[j] == worst) return false;
  }
  return true;
}

bool near(double a, double b, double scale) {
  return (std::isnan(a) && std::isnan(b)) || a == b || std::fabs(a - b) <= 2e-5 * scale + 1e-30;
}

void once(const Kernels& kernels, Pool& pool) {
  static const int64_t widths[] = {1, 2, 7, 8, 9, 16, 33, 64, 100, 257, 1100};
  Select s{};
  s.rows = between(1, between(0, 3) ? 40 : 1300);
  s.n = widths[between(0, s.rows > 200 ? 8 : 10)];
  s.k = between(1, s.n);
  s.r = between(0, 2) ? std::min<int64_t>(s.rows, between(1, 40)) : s.rows;
  s.bfloat16 = between(0, 1);
  s.by_slot = between(0, 1);
  const int kind = static_cast<int>(between(0, 2));
  const int64_t groups = (s.rows + s.r - 1) / s.r, m = between(1, between(0, 2) ? 40 : 200);
  const Array g(s.rows * s.n, s.bfloat16, kind, between(0, 1) ? s.n : 0);
  s.gradient = g.data();
  const bool with_memory = between(0, 1);
  const int64_t remembered = s.by_slot ? s.rows * s.n : s.n;
  const Array memory(remembered, false, kind == 1 ? 1 : 0);
  Block<float> left_over(new float[remembered]), live(new float[s.by_slot ? s.rows : 1]);
  if (with_memory) s.memory = memory.floats.get(), s.left = left_over.get(), s.live = live.get();
  Block<char> values(new char[groups * s.r * s.k * (s.bfloat16 ? 2 : 4)]);
  Block<int32_t> index(new int32_t[groups * s.k]);
  s.values = values.get(), s.index = index.get();
  kernels.select(s, pool);

  std::vector<bool> takes_part(s.rows);
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t j = 0; j < s.n; ++j)
      if (!(g.exact[i * s.n + j] == 0)) takes_part[i] = true;
  auto u = [&](int64_t i, int64_t j) {
    return with_memory && takes_part[i] ? g.exact[i * s.n + j] + memory.exact[s.by_slot ? i * s.n + j : j] : g.exact[i * s.n + j];
  };
  auto value = [&](int64_t i, int64_t e) {
    const int64_t at = i * s.k + e;
    return s.bfloat16 ? from_bfloat16(reinterpret_cast<uint16_t*>(values.get())[at])
                      : reinterpret_cast<float*>(values.get())[at];
  };
  std::vector<double> left(remembered);
  for (int64_t group = 0; group < groups; ++group) {
    const int32_t* kept = index.get() + group * s.k;
    std::vector<double> scores(s.n);
    bool broken = false;
    for (int64_t i = group * s.r; i < std::min(s.rows, (group + 1) * s.r); ++i)
      for (int64_t j = 0; j < s.n; ++j) scores[j] += magnitude(u(i, j)), broken |= !std::isfinite(u(i, j));
    // NaN ranks above infinity, which no double expresses: with such entries only the shape of the choice is checked.
    std::vector<double> flat(s.n);
    demand(chosen_well(broken ? flat : scores, kept, s.k, !broken && (s.r == 1 || kind == 1)), "select",
           kernels, s);
    for (int64_t i = group * s.r; i < (group + 1) * s.r; ++i) {
      std::vector<bool> is_kept(s.n);
      for (int64_t e = 0; e < s.k; ++e) {
        is_kept[kept[e]] = true;
        const float want = i < s.rows ? u(i, kept[e]) : 0;
        demand(near(value(i, e), want, s.bfloat16 && with_memory ? 500 * std::fabs(want) : 0), "values", kernels, s);
      }
      for (int64_t j = 0; i < s.rows && j < s.n; ++j)
        if (!is_kept[j] && std::isfinite(u(i, j)))
          left[s.by_slot ? i * s.n + j : j] += u(i, j);
    }
  }
  double scale = 0;
  for (const float x : g.exact) scale = std::isfinite(x) ? std::max(scale, std::fabs(static_cast<double>(x))) : scale;
  for (const float x : memory.exact) scale = std::max(scale, std::fabs(static_cast<double>(x)));
  if (!s.by_slot) scale *= static_cast<double>(s.rows);
  for (int64_t j = 0; with_memory && j < remembered; ++j) demand(near(left_over[j], left[j], scale), "left", kernels, s);
  const auto count = static_cast<float>(std::count(takes_part.begin(), takes_part.end(), true));
  if (with_memory && !s.by_slot) demand(live[0] == count, "number of rows", kernels, s);
  for (int64_t i = 0; with_memory && s.by_slot && i < s.rows; ++i)
    demand(live[i] == (takes_part[i] ? 1.0f : 0.0f), "which rows", kernels, s);
  if (kind == 2) return;  // sums in another order spread NaN differently

  Product p{};
  p.values = values.get(), p.index = index.get();
  p.values_bfloat16 = s.bfloat16, p.other_bfloat16 = between(0, 1), p.features_last = between(0, 1);
  p.groups = groups, p.r = s.r, p.k = s.k, p.rows = s.rows, p.m = m, p.n = s.n;
  const Array w(m * s.n, p.other_bfloat16, 0), x(s.rows * m, p.other_bfloat16, 0);
  auto weight = [&](int64_t a, int64_t j) { return p.features_last ? a * s.n + j : j * m + a; };
  std::vector<double> dx(s.rows * m), dw(m * s.n);
  double dx_scale = 0, dw_scale = 0;
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t e = 0; e < s.k; ++e) {
      const int64_t j = index[i / s.r * s.k + e];
      for (int64_t a = 0; a < m; ++a) {
        dx[i * m + a] += static_cast<double>(value(i, e)) * w.exact[weight(a, j)];
        dw[weight(a, j)] += static_cast<double>(value(i, e)) * x.exact[i * m + a];
      }
    }
  for (const double v : dx) dx_scale = std::max(dx_scale, std::fabs(v));
  for (const double v : dw) dw_scale = std::max(dw_scale, std::fabs(v));
  Block<float> out(new float[s.rows * m]);
  p.other = w.data(), p.out = out.get();
  kernels.grad_input(p, pool);
  for (int64_t i = 0; i < s.rows * m; ++i) demand(near(out[i], dx[i], dx_scale), "grad_input", kernels, s);
  Block<float> out_w(new float[m * s.n]);
  p.other = x.data(), p.out = out_w.get();
  kernels.grad_weight(p, pool);
  for (int64_t i = 0; i < m * s.n; ++i) demand(near(out_w[i], dw[i], dw_scale), "grad_weight", kernels, s);
}

void demand(bool holds, const char* what, const Kernels& kernels, const RowsProduct& p) {
  if (holds) return;
  ++failures;
  std::printf("%s: %s is off at rows %ld n %ld m %ld, bfloat16 %d and %d, features last %d\n", kernels.name, what,
              static_cast<long>(p.rows), static_cast<long>(p.n), static_cast<long>(p.m), p.values_bfloat16,
              p.other_bfloat16, p.features_last);
}

// Which rows are not 0: some have a single entry that is not, be it not a number or too small for arithmetic.
void live_rows_once(const Kernels& kernels, Pool& pool, RowsProduct p) {
  std::vector<float> exact(p.rows * p.n);
  Block<float> floats(new float[exact.size()]), live(new float[p.rows]);
  Block<uint16_t> halves(new uint16_t[exact.size()]);
  static const float entries[] = {1, -2, NAN, INFINITY, 1e-39f, -1e-39f};  // the last two are subnormal
  for (float& x : exact) x = between(0, 1) ? 0.0f : -0.0f;
  std::vector<float> want(p.rows);
  for (int64_t i = 0; i < p.rows; ++i)
    if (between(0, 1)) want[i] = 1, exact[i * p.n + between(0, p.n - 1)] = entries[between(0, 5)];
  std::copy(exact.begin(), exact.end(), floats.get());
  std::transform(exact.begin(), exact.end(), halves.get(), to_bfloat16);
  const void* values = p.values_bfloat16 ? static_cast<const void*>(halves.get()) : floats.get();
  kernels.live_rows({values, p.values_bfloat16, p.rows, p.n, live.get()}, pool);
  demand(std::equal(want.begin(), want.end(), live.get()), "live_rows", kernels, p);
}

// Products of the rows whose weight is not 0. What stands in the others is not a number, and must not be seen.
void rows_once(const Kernels& kernels, Pool& pool) {
  RowsProduct p{};
  const int64_t large = between(0, 5);  // one size at a time, as the plain loops are slow
  p.rows = between(1, large == 0 ? 1500 : 60);
  p.n = between(1, large == 1 ? 2300 : 60);
  p.m = between(1, large == 2 ? 700 : 60);
  p.values_bfloat16 = between(0, 1), p.other_bfloat16 = between(0, 1), p.features_last = between(0, 1);
  live_rows_once(kernels, pool, p);

  Block<float> weight(new float[p.rows]);
  const int64_t kept = between(0, 4);  // none, all, or some of them
  for (int64_t i = 0; i < p.rows; ++i) {
    const bool is_kept = kept == 1 || (kept > 1 && between(0, kept) == 0);
    weight[i] = !is_kept ? 0.0f : between(0, 1) ? 1.0f : static_cast<float>(between(2, 9)) / 2;
  }
  Array values(p.rows * p.n, p.values_bfloat16, 0), x(p.rows * p.m, p.other_bfloat16, 0);
  const Array w(p.m * p.n, p.other_bfloat16, 0);
  auto spoil = [&](Array& array, int64_t width) {
    for (int64_t i = 0; i < p.rows * width; ++i) {
      if (weight[i / width] != 0) continue;
      if (array.halves) array.halves[i] = to_bfloat16(NAN);
      if (array.floats) array.floats[i] = NAN;
    }
  };
  spoil(values, p.n);
  spoil(x, p.m);
  auto place = [&](int64_t a, int64_t j) { return p.features_last ? a * p.n + j : j * p.m + a; };
  std::vector<double> dx(p.rows * p.m), dw(p.m * p.n);
  double dx_scale = 0, dw_scale = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (weight[i] == 0) continue;
    for (int64_t j = 0; j < p.n; ++j) {
      const double value = static_cast<double>(weight[i]) * values.exact[i * p.n + j];
      for (int64_t a = 0; a < p.m; ++a) {
        dx[i * p.m + a] += value * w.exact[place(a, j)];
        dw[place(a, j)] += value * x.exact[i * p.m + a];
      }
    }
  }
  for (const double v : dx) dx_scale = std::max(dx_scale, std::fabs(v));
  for (const double v : dw) dw_scale = std::max(dw_scale, std::fabs(v));
  Block<float> out(new float[p.rows * p.m]), out_w(new float[p.m * p.n]);
  std::fill_n(out.get(), p.rows * p.m, NAN);
  std::fill_n(out_w.get(), p.m * p.n, NAN);
  p.values = values.data(), p.weight = weight.get();
  p.other = w.data(), p.out = out.get();
  kernels.rows_grad_input(p, pool);
  for (int64_t i = 0; i < p.rows * p.m; ++i) demand(near(out[i], dx[i], dx_scale), "rows_grad_input", kernels, p);
  p.other = x.data(), p.out = out_w.get();
  kernels.rows_grad_weight(p, pool);
  for (int64_t i = 0; i < p.m * p.n; ++i) demand(near(out_w[i], dw[i], dw_scale), "rows_grad_weight", kernels, p);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
  for (const msbp::Kernels* const* kernels = msbp::available(); *kernels != nullptr; ++kernels) {
    for (int i = 0; i < rounds; ++i) {
      Threads pool(1 + i % 4);
      once(**kernels, pool);
      rows_once(**kernels, pool);
    }
    std::printf("%s: %d rounds\n", (*kernels)->name, rounds);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
