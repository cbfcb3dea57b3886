// Convolutions with sparse kernels of every geometry, patterns that are out of range among them.
#pragma once

#include "fuzz_weights.h"

namespace {

WindowAxis random_axis(bool wide = false) {
  WindowAxis a{};
  while (a.out < 1) {
    const int64_t size = wide ? between(100, 200) : between(1, 13);
    a = {size, 0, between(1, 4), between(1, 3), between(1, 3), between(-2, 4)};
    const int64_t behind = between(-2, 4), padded = a.size + a.before + behind;
    a.out = (padded - (a.window - 1) * a.dilation - 1) / a.stride + 1;
    if (padded < (a.window - 1) * a.dilation + 1) a.out = 0;
  }
  return a;
}

// Calls body(pixel of x, its pixel of y, place of the window) for every pair of pixels that meet.
template <typename Convolution, typename Body>
void each_pair(const Convolution& p, const Body& body) {
  const auto at = [](const WindowAxis& a, int64_t out, int64_t k) { return out * a.stride + k * a.dilation - a.before; };
  for (int64_t image = 0; image < p.images; ++image)
    for (int64_t row = 0; row < p.vertical.out; ++row)
      for (int64_t column = 0; column < p.horizontal.out; ++column)
        for (int64_t k = 0; k < p.vertical.window * p.horizontal.window; ++k) {
          const int64_t i = at(p.vertical, row, k / p.horizontal.window);
          const int64_t j = at(p.horizontal, column, k % p.horizontal.window);
          if (i < 0 || j < 0 || i >= p.vertical.size || j >= p.horizontal.size) continue;
          body((image * p.vertical.size + i) * p.horizontal.size + j,
               (image * p.vertical.out + row) * p.horizontal.out + column, k);
        }
}

void demand_all(const std::vector<double>& expected, const Block<float>& got, const char* what, const Kernels& kernels,
                const MatrixProduct& sizes) {
  double scale = 0;
  for (const double v : expected) scale = std::max(scale, std::fabs(v));
  for (size_t i = 0; i < expected.size(); ++i) demand(near(got[i], expected[i], scale), what, kernels, sizes);
}

void convolutions_once(const Kernels& kernels, Pool& pool) {
  const MatrixProduct sizes = random_sizes();
  const int64_t groups = between(1, 2), channels = between(1, 9), n = groups * between(1, 9);
  SparseConvolution p{};
  const int64_t wide = between(0, 7);  // or tall: those are cut into bands
  p.vertical = random_axis(wide < 2), p.horizontal = random_axis(wide == 0);
  p.images = between(0, 5) == 0 && wide > 1 ? between(32, 50) : between(1, 5);  // many share a plane
  p.channels = groups * channels, p.features = n, p.groups = groups;
  const int64_t m = p.vertical.window * p.horizontal.window * channels;
  const RandomPattern pattern(m, n);
  p.entries = pattern.entries;
  p.values_bfloat16 = sizes.values_bfloat16, p.in_bfloat16 = p.g_bfloat16 = sizes.other_bfloat16;
  const int64_t x_size = p.images * p.vertical.size * p.horizontal.size * p.channels;
  const int64_t y_size = p.images * p.vertical.out * p.horizontal.out * n;
  const Array values(p.entries, p.values_bfloat16, 0), x(x_size, p.in_bfloat16, 0), g(y_size, p.g_bfloat16, 0);
  std::vector<double> y(y_size), dx(x_size), dw(p.entries);
  each_pair(p, [&](int64_t pixel, int64_t out, int64_t k) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t c = 0; c < channels; ++c) {
        const int32_t e = pattern.number[(k * channels + c) * n + j];
        if (e < 0) continue;
        const int64_t from = pixel * p.channels + j / (n / groups) * channels + c;
        y[out * n + j] += static_cast<double>(x.exact[from]) * values.exact[e];
        dx[from] += static_cast<double>(g.exact[out * n + j]) * values.exact[e];
        dw[e] += static_cast<double>(x.exact[from]) * g.exact[out * n + j];
      }
  });
  const auto compare = [&](const std::vector<double>& expected, const Block<float>& got, const char* what) {
    demand_all(expected, got, what, kernels, sizes);
  };
  Block<float> out(new float[y_size]), out_x(new float[x_size]), out_w(new float[p.entries]);
  p.values = values.data(), p.starts = pattern.starts.get(), p.inner = pattern.inner.get(), p.in = x.data();
  p.out = out.get();
  demand(kernels.convolution(p, pool), "a pattern of a convolution", kernels, sizes);
  compare(y, out, "convolution");
  SparseConvolution d = p;
  d.values = nullptr, d.g = g.data(), d.out = out_w.get();
  demand(kernels.convolution_weight_gradient(d, pool), "a pattern of its gradient", kernels, sizes);
  compare(dw, out_w, "convolution_weight_gradient");
  SparseConvolution t = p;
  t.starts = pattern.starts_by_input.get(), t.inner = pattern.features.get(), t.order = pattern.order.get();
  t.in = g.data(), t.out = out_x.get();
  demand(kernels.convolution_input_gradient(t, pool), "a pattern by inputs", kernels, sizes);
  compare(dx, out_x, "convolution_input_gradient");
  if (pattern.used == 0) return;
  const int64_t spoiled = between(0, pattern.used - 1);  // none of these may be followed
  pattern.inner[spoiled] = between(0, 1) ? static_cast<int32_t>(m) : -1;
  pattern.order[spoiled] = between(0, 1) ? static_cast<int32_t>(p.entries) : -1;
  demand(!kernels.convolution(p, pool) && !kernels.convolution_weight_gradient(d, pool) &&
             !kernels.convolution_input_gradient(t, pool),
         "an index out of range", kernels, sizes);
}

// Dense convolutions of which some images are left out.
void images_once(const Kernels& kernels, Pool& pool) {
  const MatrixProduct sizes = random_sizes();
  ImagesProduct p{};
  const int64_t wide = between(0, 9);
  p.vertical = random_axis(wide == 1), p.horizontal = random_axis(wide == 0);
  p.images = between(1, 5), p.channels = between(1, 40), p.features = between(1, 70);
  if (between(0, 9) == 0) p.channels = between(100, 150), p.features = between(100, 150);  // dw by places
  p.values_bfloat16 = sizes.values_bfloat16, p.other_bfloat16 = sizes.other_bfloat16;
  const int64_t m = p.channels, n = p.features;
  const int64_t x_size = p.images * p.vertical.size * p.horizontal.size * m;
  const int64_t pixels = p.vertical.out * p.horizontal.out, y_size = p.images * pixels * n;
  const int64_t w_size = p.vertical.window * p.horizontal.window * m * n;
  const Array g(y_size, p.values_bfloat16, 0), w(w_size, p.other_bfloat16, 0), x(x_size, p.other_bfloat16, 0);
  Block<float> weight(new float[p.images]);
  for (int64_t i = 0; i < p.images; ++i) weight[i] = between(0, 2) != 0;
  std::vector<double> dx(x_size), dw(w_size);
  each_pair(p, [&](int64_t pixel, int64_t out, int64_t k) {
    if (weight[out / pixels] == 0) return;
    for (int64_t c = 0; c < m; ++c)
      for (int64_t j = 0; j < n; ++j) {
        const double of_g = g.exact[out * n + j];
        dx[pixel * m + c] += of_g * w.exact[(k * m + c) * n + j];
        dw[(k * m + c) * n + j] += of_g * x.exact[pixel * m + c];
      }
  });
  const auto compare = [&](const std::vector<double>& expected, const Block<float>& got, const char* what) {
    demand_all(expected, got, what, kernels, sizes);
  };
  Block<float> out_x(new float[x_size]), out_w(new float[w_size]);
  p.values = g.data(), p.weight = weight.get();
  p.other = w.data(), p.out = out_x.get();
  kernels.images_grad_input(p, pool);
  compare(dx, out_x, "images_grad_input");
  p.other = x.data(), p.out = out_w.get();
  kernels.images_grad_weight(p, pool);
  compare(dw, out_w, "images_grad_weight");
}

}  // namespace
