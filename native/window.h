// The sizes of a convolution as XLA's calls have them, checked.
#pragma once

#include "operands.h"

namespace msbp {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

using Numbers = ffi::Span<const int64_t>;

// Sizes from the images, channels last, and an attribute of [window, stride, dilation, before] of each axis.
template <typename Product>
void read_images(Product& p, const std::vector<int64_t>& x, const std::vector<int64_t>& y, Numbers axes, Check& check) {
  check.range("numbers of the geometry", static_cast<int64_t>(axes.size()), 8, 8);
  if (!check.good()) return;
  const auto axis = [&](int64_t at) {
    const int64_t* of = axes.begin() + 4 * at;
    const WindowAxis a{x[1 + at], y[1 + at], of[0], of[1], of[2], of[3]};
    for (const int64_t size : {a.size, a.out, a.window, a.stride, a.dilation})
      check.range("sizes of an image and its window", size, 1, 1 << 20);
    check.range("padding", a.before, -(1 << 20), 1 << 20);
    return a;
  };
  p.vertical = axis(0), p.horizontal = axis(1);
  p.images = x[0], p.channels = x[3], p.features = y[3];
  check.range("images", p.images, 1, kMost);
  check.range("images of the result", y[0], p.images, p.images);
  check.range("channels", p.channels, 1, 1 << 20);
  check.range("features", p.features, 1, 1 << 20);
}

}  // namespace
}  // namespace msbp
