// Cotangents that come as matrices: which rows are live, products of rows and of entries, and entries made 0 by chance.
#pragma once

#include "fuzz.h"

namespace {

void demand(bool holds, const char* what, const Kernels& kernels, const MatrixProduct& p) {
  if (holds) return;
  ++failures;
  std::printf("%s: %s is off at rows %ld n %ld m %ld, bfloat16 %d and %d, features last %d\n", kernels.name, what,
              static_cast<long>(p.rows), static_cast<long>(p.n), static_cast<long>(p.m), p.values_bfloat16,
              p.other_bfloat16, p.features_last);
}

MatrixProduct random_sizes() {
  MatrixProduct p{};
  const int64_t large = between(0, 5);  // one size at a time, as the plain loops are slow
  p.rows = between(1, large == 0 ? 1500 : 60);
  p.n = between(1, large == 1 ? 2300 : 60);
  p.m = between(1, large == 2 ? 700 : 60);
  p.values_bfloat16 = between(0, 1), p.other_bfloat16 = between(0, 1), p.features_last = between(0, 1);
  return p;
}

// Both products of the cotangent `exact`, into memory that is not a number before.
void check_products(MatrixProduct p, const std::vector<double>& exact, const Array& x, const Kernels& kernels,
                    void (*grad_input)(const MatrixProduct&, Pool&), void (*grad_weight)(const MatrixProduct&, Pool&),
                    Pool& pool) {
  const Array w(p.m * p.n, p.other_bfloat16, 0);
  auto place = [&](int64_t a, int64_t j) { return p.features_last ? a * p.n + j : j * p.m + a; };
  std::vector<double> dx(p.rows * p.m), dw(p.m * p.n);
  double dx_scale = 0, dw_scale = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.n; ++j) {
      const double value = exact[i * p.n + j];
      for (int64_t a = 0; value != 0 && a < p.m; ++a) {
        dx[i * p.m + a] += value * w.exact[place(a, j)];
        dw[place(a, j)] += value * x.exact[i * p.m + a];
      }
    }
  for (const double v : dx) dx_scale = std::max(dx_scale, std::fabs(v));
  for (const double v : dw) dw_scale = std::max(dw_scale, std::fabs(v));
  Block<float> out(new float[p.rows * p.m]), out_w(new float[p.m * p.n]);
  std::fill_n(out.get(), p.rows * p.m, NAN);
  std::fill_n(out_w.get(), p.m * p.n, NAN);
  p.other = w.data(), p.out = out.get();
  grad_input(p, pool);
  for (int64_t i = 0; i < p.rows * p.m; ++i) demand(near(out[i], dx[i], dx_scale), "grad_input", kernels, p);
  p.other = x.data(), p.out = out_w.get();
  grad_weight(p, pool);
  for (int64_t i = 0; i < p.m * p.n; ++i) demand(near(out_w[i], dw[i], dw_scale), "grad_weight", kernels, p);
}

// Which rows are not 0: some have a single entry that is not, be it not a number or too small for arithmetic.
void live_rows_once(const Kernels& kernels, Pool& pool, MatrixProduct p) {
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
  MatrixProduct p = random_sizes();
  live_rows_once(kernels, pool, p);

  Block<float> weight(new float[p.rows]);
  const int64_t kept = between(0, 4);  // none, all, or some of them
  for (int64_t i = 0; i < p.rows; ++i) {
    const bool is_kept = kept == 1 || (kept > 1 && between(0, kept) == 0);
    weight[i] = !is_kept ? 0.0f : between(0, 1) ? 1.0f : static_cast<float>(between(2, 9)) / 2;
  }
  Array values(p.rows * p.n, p.values_bfloat16, 0), x(p.rows * p.m, p.other_bfloat16, 0);
  auto spoil = [&](Array& array, int64_t width) {
    for (int64_t i = 0; i < p.rows * width; ++i) {
      if (weight[i / width] != 0) continue;
      if (array.halves) array.halves[i] = to_bfloat16(NAN);
      if (array.floats) array.floats[i] = NAN;
    }
  };
  spoil(values, p.n);
  spoil(x, p.m);
  std::vector<double> exact(p.rows * p.n);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; weight[i] != 0 && j < p.n; ++j)
      exact[i * p.n + j] = static_cast<double>(weight[i]) * values.exact[i * p.n + j];
  p.values = values.data(), p.weight = weight.get();
  check_products(p, exact, x, kernels, kernels.rows_grad_input, kernels.rows_grad_weight, pool);
}

// Products of entries that are not 0: none, few, half or all of them, some rows and columns without any.
void entries_once(const Kernels& kernels, Pool& pool) {
  MatrixProduct p = random_sizes();
  Array values(p.rows * p.n, p.values_bfloat16, 0, between(0, 1) ? p.n : 0);
  const Array x(p.rows * p.m, p.other_bfloat16, 0);
  const int64_t share = between(0, 3), idle = between(0, p.n - 1);
  for (int64_t e = 0; e < p.rows * p.n; ++e) {
    const bool kept = share == 3 || (share == 2 && between(0, 1)) || (share == 1 && between(0, 20) == 0);
    if (kept && e % p.n != idle) continue;
    values.exact[e] = between(0, 1) ? 0.0f : -0.0f;
    if (values.halves) values.halves[e] = to_bfloat16(values.exact[e]);
    if (values.floats) values.floats[e] = values.exact[e];
  }
  const float scale = between(0, 1) ? 1.0f : 0.375f;
  std::vector<double> exact(values.exact.begin(), values.exact.end());
  for (double& value : exact) value *= scale;
  p.values = values.data(), p.weight = &scale;
  check_products(p, exact, x, kernels, kernels.entries_grad_input, kernels.entries_grad_weight, pool);
}

// Entries made 0 by chance are multiples of the step next to what they were, or pruned; and as many as is said.
void dither_once(const Kernels& kernels, Pool& pool) {
  const MatrixProduct sizes = random_sizes();
  const int64_t entries = sizes.rows * sizes.n;
  const Array g(entries, sizes.values_bfloat16, between(0, 1) ? 0 : 2, between(0, 1) ? sizes.n : 0);
  Block<uint32_t> numbers(new uint32_t[sizes.rows]);
  for (int64_t i = 0; i < sizes.rows; ++i) numbers[i] = static_cast<uint32_t>(random_bits());
  const uint32_t key[2] = {static_cast<uint32_t>(random_bits()), static_cast<uint32_t>(random_bits())};
  const float steps[] = {0, 0.25f, 4}, step = steps[between(0, 2)];
  Block<char> out(new char[entries * (sizes.values_bfloat16 ? 2 : 4)]);
  Block<float> kept(new float[sizes.rows]), moments(new float[3 * sizes.rows]);
  Dither d{g.data(), numbers.get(), key, &step, sizes.values_bfloat16, between(0, 1) == 1, sizes.rows, sizes.n, out.get(),
           kept.get()};
  kernels.dither(d, pool);
  kernels.row_moments({g.data(), sizes.values_bfloat16, sizes.rows, sizes.n, moments.get()}, pool);
  for (int64_t i = 0; i < sizes.rows; ++i) {
    int64_t count = 0, finite = 0;
    double total = 0, largest = 0;
    bool live = false;
    for (int64_t e = i * sizes.n; e < (i + 1) * sizes.n; ++e) {
      const double before = g.exact[e];
      const double after = sizes.values_bfloat16 ? from_bfloat16(reinterpret_cast<uint16_t*>(out.get())[e])
                                                 : reinterpret_cast<float*>(out.get())[e];
      const bool levels = step > 0 && !d.prunes && sizes.values_bfloat16;
      const double off = std::fabs(after * (levels ? step : 1) - before);
      const bool same = after == before || std::isnan(before) == std::isnan(after);
      const bool next_to = step > 0 && off <= step * 1.00001 + (levels ? 0.01 : 1e-5) * std::fabs(before);
      demand(std::isfinite(before) ? (step > 0 ? next_to : off == 0) : same, "dither", kernels, sizes);
      demand(before != 0 || after == 0, "a zero that is dithered", kernels, sizes);
      count += after != 0;
      live = live || before != 0;
      if (!std::isfinite(before)) continue;
      ++finite, total += before, largest = std::max(largest, std::fabs(before));
    }
    demand(kept[i] == count, "number of entries", kernels, sizes);
    const double mean = finite ? total / finite : 0;
    double squares = 0;
    for (int64_t e = i * sizes.n; e < (i + 1) * sizes.n; ++e)
      if (std::isfinite(g.exact[e])) squares += (g.exact[e] - mean) * (g.exact[e] - mean);
    demand(moments[3 * i] == (live ? finite : 0), "finite entries", kernels, sizes);
    demand(finite == 0 || near(moments[3 * i + 1], mean, largest), "mean", kernels, sizes);
    demand(near(moments[3 * i + 2], std::sqrt(squares), 10 * (std::sqrt(squares) + 1e-3 * largest)), "norm", kernels, sizes);
  }
}

}  // namespace
