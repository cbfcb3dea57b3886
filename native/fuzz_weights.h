// Products with sparse weights, patterns with empty lists among them, and patterns that are out of range.
#pragma once

#include "fuzz_matrices.h"

namespace {

// A pattern of an [m, n] weight, in both orders, with entries at its end that are in no list.
struct RandomPattern {
  std::vector<int32_t> number;  // [m, n]: which entry stands there, or -1
  int64_t used, entries;
  Block<int32_t> starts, inner, starts_by_input, features, order;

  RandomPattern(int64_t m, int64_t n) : number(m * n, -1) {
    const int64_t share = between(0, 3);
    std::vector<int32_t> of_feature, of_input, begins{0}, begins_by_input{0}, permuted;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < m; ++i)
        if (share == 3 || (share > 0 && between(0, 1 + 10 * (share == 1)) == 0)) {
          number[i * n + j] = static_cast<int32_t>(of_feature.size());
          of_feature.push_back(static_cast<int32_t>(i));
        }
      begins.push_back(static_cast<int32_t>(of_feature.size()));
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j)
        if (number[i * n + j] >= 0)
          of_input.push_back(static_cast<int32_t>(j)), permuted.push_back(number[i * n + j]);
      begins_by_input.push_back(static_cast<int32_t>(of_input.size()));
    }
    used = static_cast<int64_t>(of_feature.size()), entries = used + 1 + between(0, 3);
    const auto block = [](const std::vector<int32_t>& from, int64_t size) {
      Block<int32_t> out(new int32_t[size]);
      std::fill_n(out.get(), size, 0);
      std::copy(from.begin(), from.end(), out.get());
      return out;
    };
    inner = block(of_feature, entries), features = block(of_input, entries), order = block(permuted, entries);
    starts = block(begins, n + 1), starts_by_input = block(begins_by_input, m + 1);
  }
};

void weights_once(const Kernels& kernels, Pool& pool) {
  const MatrixProduct sizes = random_sizes();
  const int64_t rows = sizes.rows, m = sizes.n, n = sizes.m;
  const RandomPattern pattern(m, n);
  const std::vector<int32_t>& number = pattern.number;
  const int64_t used = pattern.used, entries = pattern.entries;
  const Array values(entries, sizes.values_bfloat16, 0), x(rows * m, sizes.other_bfloat16, 0),
      g(rows * n, sizes.other_bfloat16, 0);
  std::vector<double> y(rows * n), dx(rows * m), dw(entries);
  double y_scale = 0, dx_scale = 0, dw_scale = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t row = 0; number[i * n + j] >= 0 && row < rows; ++row) {
        const int32_t e = number[i * n + j];
        y[row * n + j] += static_cast<double>(x.exact[row * m + i]) * values.exact[e];
        dx[row * m + i] += static_cast<double>(g.exact[row * n + j]) * values.exact[e];
        dw[e] += static_cast<double>(x.exact[row * m + i]) * g.exact[row * n + j];
      }
  for (const double v : y) y_scale = std::max(y_scale, std::fabs(v));
  for (const double v : dx) dx_scale = std::max(dx_scale, std::fabs(v));
  for (const double v : dw) dw_scale = std::max(dw_scale, std::fabs(v));
  Block<float> out(new float[rows * n]), out_x(new float[rows * m]), out_w(new float[entries]);
  WeightProduct p{values.data(), pattern.starts.get(), pattern.inner.get(), nullptr, x.data(), sizes.values_bfloat16,
                  sizes.other_bfloat16, entries, n, m, rows, out.get()};
  demand(kernels.weight_times(p, pool), "a pattern", kernels, sizes);
  for (int64_t i = 0; i < rows * n; ++i) demand(near(out[i], y[i], y_scale), "weight_times", kernels, sizes);
  WeightProduct t{values.data(), pattern.starts_by_input.get(), pattern.features.get(), pattern.order.get(), g.data(), sizes.values_bfloat16,
                  sizes.other_bfloat16, entries, m, n, rows, out_x.get()};
  demand(kernels.weight_times(t, pool), "a pattern by inputs", kernels, sizes);
  for (int64_t i = 0; i < rows * m; ++i) demand(near(out_x[i], dx[i], dx_scale), "weight_times, dx", kernels, sizes);
  WeightGradient d{x.data(), g.data(), pattern.starts.get(), pattern.inner.get(), sizes.other_bfloat16, sizes.other_bfloat16, entries,
                   rows, m, n, out_w.get()};
  demand(kernels.weight_gradient(d, pool), "a pattern of a gradient", kernels, sizes);
  for (int64_t e = 0; e < entries; ++e) demand(near(out_w[e], dw[e], dw_scale), "weight_gradient", kernels, sizes);
  Block<float> whole(new float[m * n]), taken(new float[entries]);
  const Array plain(entries, false, 0);
  DenseWeight u{pattern.starts.get(), pattern.inner.get(), plain.data(), false, m, n, entries, whole.get()};
  demand(kernels.unpack(u, pool), "a pattern to unpack", kernels, sizes);
  for (int64_t i = 0; i < m * n; ++i)
    demand(whole[i] == (number[i] < 0 ? 0.0f : plain.exact[number[i]]), "unpack", kernels, sizes);
  DenseWeight k = u;
  k.in = whole.get(), k.out = taken.get();
  demand(kernels.pack(k, pool), "a pattern to pack", kernels, sizes);
  for (int64_t e = 0; e < entries; ++e) demand(taken[e] == (e < used ? plain.exact[e] : 0), "pack", kernels, sizes);
  const int64_t most = between(1, m * n + 2), count = between(0, most);
  const Array scores(m * n, false, 1);  // ties, and numbers below 0, which are never taken
  Block<int32_t> places(new int32_t[most]);
  kernels.largest({static_cast<const float*>(scores.data()), m * n, count, most, places.get()}, pool);
  std::vector<int32_t> best;
  for (int64_t i = 0; i < m * n; ++i)
    if (scores.exact[i] >= 0) best.push_back(static_cast<int32_t>(i));
  std::stable_sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return scores.exact[a] > scores.exact[b]; });
  best.resize(std::min<size_t>(best.size(), count));
  std::sort(best.begin(), best.end());
  best.resize(most, static_cast<int32_t>(m * n));
  demand(std::equal(best.begin(), best.end(), places.get()), "largest", kernels, sizes);
  if (used == 0) return;
  const int64_t spoiled = between(0, used - 1);  // none of these may be followed
  pattern.inner[spoiled] = between(0, 1) ? static_cast<int32_t>(m) : -1;
  demand(!kernels.weight_times(p, pool) && !kernels.weight_gradient(d, pool), "an index out of range", kernels, sizes);
}

}  // namespace
