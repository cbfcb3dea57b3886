// Images turned into planes, one a channel, in which a row of pixels follows the other with zeros between them.
//
// There are as many zeros as a window reaches over the edge, so that a place of the window is one shift for all pixels,
// and a plane is read like a row of a matrix. With a stride, x has a plane for each phase of its rows and columns,
// x[stride i + phase], and all shifts are whole pixels of such planes. A plane is for some images, or for a band of rows
// of one, as the second-level cache holds.
#pragma once

#include <limits>

#include "tile.h"

namespace {

MSBP_INLINE int64_t floor_div(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }

// One axis of the pixels, in pixels of a plane.
struct Line {
  int64_t size, out, stride;
  int64_t low, high;  // the least and the greatest shift
  int64_t reach;      // pixels of a phase of x
  int64_t pitch;      // from one row or image to the next, so that what a shift reads beyond an edge is 0

  explicit Line(const msbp::WindowAxis& a) : size(a.size), out(a.out), stride(a.stride) {
    low = shift(a, 0), high = shift(a, a.window - 1);
    reach = ceil_div(size, stride);
    pitch = most(1, most(reach + most(0, -low), out + most(0, high)));
  }
  static int64_t shift(const msbp::WindowAxis& a, int64_t k) { return floor_div(k * a.dilation - a.before, a.stride); }
  static int64_t phase(const msbp::WindowAxis& a, int64_t k) {
    return k * a.dilation - a.before - a.stride * shift(a, k);
  }
};

// Which pixels of images [height, width, channels] a plane has: those `down` and `across` apart from one on, of which
// those in [top, bottom) and [left, right) are read. What a stride leaves over, and padding cuts off, may hold anything.
struct Pixels {
  int64_t height, width, channels;
  int64_t down = 1, across = 1, row = 0, column = 0;
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  static Pixels all(int64_t height, int64_t width, int64_t channels) {
    return {height, width, channels, 1, 1, 0, 0, 0, height, 0, width};
  }
  bool same_phase(const Pixels& other) const { return row == other.row && column == other.column; }
};

// How images lie in planes, and which task has which of them.
struct Planes {
  Line vertical, horizontal;
  int64_t images;  // of a task
  int64_t band;    // rows of a task, where it has one image
  int64_t bands, tasks;
  int64_t over;    // rows that a shift reads beyond those of a task
  int64_t margin;  // floats before and behind what a task computes
  int64_t length;  // of a plane in floats, margins included
  int64_t block;   // floats that are computed at once

  Planes(const msbp::SparseConvolution& p, int64_t planes) : vertical(p.vertical), horizontal(p.horizontal) {
    constexpr int64_t kCacheFloats = 192 * 1024;
    block = kTileFloats;
    const int64_t rows = vertical.pitch, pitch = horizontal.pitch, image = rows * pitch;
    over = most(most(0, -vertical.low), vertical.high);
    margin = ceil_div((over + 1) * pitch + most(most(0, -horizontal.low), horizontal.high), VL) * VL;
    const int64_t fits = most(2 * block, kCacheFloats / most(1, planes) - 2 * margin);
    band = rows, images = 1, bands = 1;
    if (image > fits) {
      bands = ceil_div(rows, most(1, fits / pitch));
      band = ceil_div(rows, bands), bands = ceil_div(rows, band);
    } else {
      images = most(1, least(least(fits / image, 8), p.images / 16));
    }
    // A few large images are cut into bands, too, so that there is something to share.
    constexpr int64_t kLeastTasks = 8;
    if (images == 1 && p.images * bands < kLeastTasks) {
      bands = least(ceil_div(kLeastTasks, p.images), most(1, image / (2 * block)));
      band = ceil_div(rows, bands), bands = ceil_div(rows, band);
    }
    tasks = bands * ceil_div(p.images, images);
    length = 2 * margin + ceil_div(images * band * pitch, block) * block;
    if (length % 1024 == 0) length += VL;  // planes a power of two apart would share their places in the cache
  }

  struct Task {
    int64_t first, images, begin, end;  // images, and rows of each
  };
  bool addressable(int64_t planes) const { return planes * length <= std::numeric_limits<int32_t>::max(); }
  Task at(int64_t task, int64_t all) const {
    const int64_t first = task / bands * images, begin = task % bands * band;
    return {first, least(images, all - first), begin, least(vertical.pitch, begin + band)};
  }
  int64_t floats(const Task& t) const { return t.images * (t.end - t.begin) * horizontal.pitch; }
};

// planes[channel] = the images of a task, with so many rows around its own.
template <typename T>
MSBP_INLINE void load_planes(const Planes& all, const Planes::Task& t, const T* in, const Pixels& of, int64_t over,
                             float* planes) {
  const int64_t pitch = all.horizontal.pitch, rows = t.end - t.begin;
  std::memset(planes, 0, of.channels * all.length * sizeof(float));
  if (of.left >= of.right) return;
  for (int64_t image = 0; image < t.images; ++image) {
    // Between images there are zeros enough; the rows around a band are those of its own image.
    const int64_t begin = all.bands > 1 ? most(of.top, t.begin - over) : of.top;
    const int64_t end = all.bands > 1 ? least(of.bottom, t.end + over) : of.bottom;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t line = (t.first + image) * of.height + row * of.down + of.row;
      const T* pixels = in + (line * of.width + of.left * of.across + of.column) * of.channels;
      float* to = planes + all.margin + (image * rows + row - t.begin) * pitch + of.left;
      transpose(pixels, of.across * of.channels, of.right - of.left, of.channels, to, all.length);
    }
  }
}

// Writes what was computed of the floats [begin, begin + block) of a task, tile[channel], to the pixels of a phase.
MSBP_INLINE void store_block(const Planes& all, const Planes::Task& t, int64_t begin, const float* tile,
                             const Pixels& of, float* out) {
  const int64_t pitch = all.horizontal.pitch, rows = t.end - t.begin;
  const int64_t end = least(begin + all.block, all.floats(t));
  for (int64_t at = begin; at < end;) {
    const int64_t line = at / pitch, column = at % pitch, next = least(end, (line + 1) * pitch);
    const int64_t row = t.begin + line % rows, image = t.first + line / rows;
    const int64_t run = least(of.right - column, next - at);
    if (row < of.bottom && run > 0) {
      const int64_t pixel = (image * of.height + row * of.down + of.row) * of.width + column * of.across + of.column;
      transpose(tile + at - begin, all.block, of.channels, run, out + pixel * of.channels, of.across * of.channels);
    }
    at = next;
  }
}

}  // namespace
