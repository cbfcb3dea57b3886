// Selections and the products of kept columns, against loops that are plainly right.
#pragma once

#include "fuzz.h"

namespace {

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

void columns_once(const Kernels& kernels, Pool& pool) {
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

}  // namespace
