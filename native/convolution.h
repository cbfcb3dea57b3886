// Convolutions with a sparse kernel, images with their channels last; nothing is unfolded.
//
//   y[o] at q       = sum over the entries (k, c, o) of w x[c] at q + shift(k)
//   dx[c] at q      = sum over the entries (k, c, o) of w g[o] at q - shift(k)
//   dw of (k, c, o) = sum over q of x[c] at q + shift(k) times g[o] at q
//
// Images are turned into planes, one a channel, in which a row of pixels follows the other with zeros between them, as
// many as a window reaches over the edge: then a place of the window is one shift for all pixels, and a plane is read
// like a row of a matrix. With a stride, x has a plane for each phase of its rows and columns, x[stride i + phase], and
// all shifts are whole pixels of such planes. A plane is for some images, or for a band of rows of one, as the
// second-level cache holds.
#pragma once

#include <algorithm>
#include <atomic>

#include "weights.h"

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

// Pixels of an image [height, width, channels] that stand `stride` apart, from `row` and `column` on.
struct Phase {
  int64_t row, column;
};

// How images lie in planes, and which task has which of them.
struct Planes {
  Line vertical, horizontal;
  int64_t images;                 // of a task
  int64_t band;                   // rows of a task, where it has one image
  int64_t bands, tasks;
  int64_t over;                   // rows that a shift reads beyond those of a task
  int64_t margin;                 // floats before and behind what a task computes
  int64_t length;                 // of a plane in floats, margins included
  int64_t block;                  // floats that are computed at once

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
    tasks = bands * ceil_div(p.images, images);
    length = 2 * margin + ceil_div(images * band * pitch, block) * block;
    if (length % 1024 == 0) length += VL;  // planes a power of two apart would share their places in the cache
  }

  struct Task {
    int64_t first, images, begin, end;  // images, and rows of each
  };
  Task at(int64_t task, int64_t all) const {
    const int64_t first = task / bands * images, begin = task % bands * band;
    return {first, least(images, all - first), begin, least(vertical.pitch, begin + band)};
  }
  int64_t floats(const Task& t) const { return t.images * (t.end - t.begin) * horizontal.pitch; }
};

// planes[channel] = the images of a task at one phase, with so many rows around its own.
template <typename T>
MSBP_INLINE void load_planes(const Planes& all, const Planes::Task& t, const T* in, int64_t height, int64_t width,
                             int64_t channels, int64_t stride_down, int64_t stride_across, Phase phase, int64_t over,
                             float* planes) {
  const int64_t pitch = all.horizontal.pitch, rows = t.end - t.begin;
  const int64_t there = phase.row < height ? ceil_div(height - phase.row, stride_down) : 0;
  const int64_t across = phase.column < width ? ceil_div(width - phase.column, stride_across) : 0;
  std::memset(planes, 0, channels * all.length * sizeof(float));
  for (int64_t image = 0; image < t.images; ++image) {
    // Between images there are zeros enough; the rows around a band are those of its own image.
    const int64_t begin = all.bands > 1 ? most(0, t.begin - over) : 0;
    const int64_t end = all.bands > 1 ? least(there, t.end + over) : there;
    for (int64_t row = begin; row < end; ++row) {
      const T* pixels = in + (((t.first + image) * height + row * stride_down + phase.row) * width + phase.column) * channels;
      float* to = planes + all.margin + (image * rows + row - t.begin) * pitch;
      transpose(pixels, stride_across * channels, across, channels, to, all.length);
    }
  }
}

// Writes what was computed of the floats [begin, begin + block) of a task, tile[channel], to the pixels of a phase.
MSBP_INLINE void store_block(const Planes& all, const Planes::Task& t, int64_t begin, const float* tile, int64_t height,
                             int64_t width, int64_t channels, int64_t stride_down, int64_t stride_across, Phase phase,
                             float* out) {
  const int64_t pitch = all.horizontal.pitch, rows = t.end - t.begin;
  const int64_t end = least(begin + all.block, all.floats(t));
  for (int64_t at = begin; at < end;) {
    const int64_t line = at / pitch, column = at % pitch, next = least(end, (line + 1) * pitch);
    const int64_t row = (t.begin + line % rows) * stride_down + phase.row, image = t.first + line / rows;
    const int64_t across = phase.column < width ? ceil_div(width - phase.column, stride_across) : 0;
    const int64_t run = least(across - column, next - at);
    if (row < height && run > 0) {
      float* to = out + ((image * height + row) * width + column * stride_across + phase.column) * channels;
      transpose(tile + at - begin, all.block, channels, run, to, stride_across * channels);
    }
    at = next;
  }
}

struct Shifted {
  int32_t at;  // float of the planes that is read for the first pixel
  float value;
};

MSBP_INLINE void sum_shifted(const Shifted* entry, const Shifted* end, const float* planes, float* out) {
  Floats total[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) total[v] = Floats{};
  for (; entry != end; ++entry) {
    const float* from = planes + entry->at;
    const Floats value = broadcast(entry->value);
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) total[v] += value * load(from + v * VL);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; ++v) store(out + v * VL, total[v]);
}

// The places of a window: where each reads, and in which phase of x; only phases that are read are numbered.
struct Window {
  int64_t places = 0, phases = 0;
  int64_t* shift;   // [places]
  int64_t* number;  // [places], of the phase
  Phase* phase;     // [phases]

  Window(const msbp::SparseConvolution& p, const Planes& planes) {
    places = p.vertical.window * p.horizontal.window;
    shift = scratch<int64_t>(msbp::Slot::kColumns, 2 * places + 2 * places);
    number = shift + places;
    phase = reinterpret_cast<Phase*>(number + places);
    for (int64_t k = 0; k < places; ++k) {
      const int64_t down = k / p.horizontal.window, across = k % p.horizontal.window;
      shift[k] = Line::shift(p.vertical, down) * planes.horizontal.pitch + Line::shift(p.horizontal, across);
      const Phase own{Line::phase(p.vertical, down), Line::phase(p.horizontal, across)};
      int64_t at = 0;
      while (at < phases && (phase[at].row != own.row || phase[at].column != own.column)) ++at;
      if (at == phases) phase[phases++] = own;
      number[k] = at;
    }
  }
  static int64_t most_phases(const msbp::SparseConvolution& p) {
    return least(p.vertical.stride, p.vertical.window) * least(p.horizontal.stride, p.horizontal.window);
  }
};

// Entries feature by feature, each with where it reads the planes of x; false if an index is out of range.
template <typename Value>
bool of_features(const msbp::SparseConvolution& p, const Planes& planes, const Window& window, Shifted* entries) {
  const int64_t channels = p.channels / p.groups, m = window.places * channels, n = p.features / p.groups;
  const Value* values = static_cast<const Value*>(p.values);
  for (int64_t o = 0; o < p.features; ++o) {
    const int64_t first = o / n * channels;
    for (int32_t e = p.starts[o]; e < p.starts[o + 1]; ++e) {
      const int64_t inner = p.inner[e];
      if (inner < 0 || inner >= m) return false;
      const int64_t k = inner / channels, plane = window.number[k] * p.channels + first + inner % channels;
      entries[e] = {static_cast<int32_t>(plane * planes.length + window.shift[k]), values ? widen(values[e]) : 0.0f};
    }
  }
  return true;
}

// Planes of x that a task reads: of each phase, the channels.
template <typename T>
MSBP_INLINE void load_input(const msbp::SparseConvolution& p, const Planes& planes, const Planes::Task& t,
                            const Window& window, const T* x, float* to) {
  for (int64_t f = 0; f < window.phases; ++f)
    load_planes(planes, t, x, p.vertical.size, p.horizontal.size, p.channels, p.vertical.stride, p.horizontal.stride,
                window.phase[f], planes.over, to + f * p.channels * planes.length);
}

template <typename Value, typename Other>
bool convolution(const msbp::SparseConvolution& p, msbp::Pool& pool) {
  if (!are_lists(p.starts, p.features, p.entries)) return false;
  const Planes planes(p, Window::most_phases(p) * p.channels);
  const Window window(p, planes);
  Shifted* entries = scratch<Shifted>(msbp::Slot::kLists, most(1, p.starts[p.features]));
  if (!of_features<Value>(p, planes, window, entries)) return false;
  parallel(pool, planes.tasks, [&](int64_t task) {
    const Planes::Task t = planes.at(task, p.images);
    float* x = scratch<float>(msbp::Slot::kTile, window.phases * p.channels * planes.length);
    float* tile = scratch<float>(msbp::Slot::kResult, p.features * planes.block);
    load_input(p, planes, t, window, static_cast<const Other*>(p.in), x);
    for (int64_t begin = 0; begin < planes.floats(t); begin += planes.block) {
      for (int64_t o = 0; o < p.features; ++o)
        sum_shifted(entries + p.starts[o], entries + p.starts[o + 1], x + planes.margin + begin, tile + o * planes.block);
      store_block(planes, t, begin, tile, p.vertical.out, p.horizontal.out, p.features, 1, 1, {0, 0}, p.out);
    }
  });
  return true;
}

template <typename Value, typename Other>
bool convolution_input_gradient(const msbp::SparseConvolution& p, msbp::Pool& pool) {
  const int64_t channels = p.channels / p.groups, n = p.features / p.groups;
  const int64_t m = p.vertical.window * p.horizontal.window * channels;
  if (!are_lists(p.starts, m, p.entries)) return false;
  const Planes planes(p, p.features);
  const Window window(p, planes);
  const Value* values = static_cast<const Value*>(p.values);
  // A list for each phase and channel of x: those of the places of the window that read it.
  const int64_t lists = window.phases * p.channels;
  Shifted* entries = scratch<Shifted>(msbp::Slot::kLists, most(1, p.starts[m]));
  int32_t* starts = scratch<int32_t>(msbp::Slot::kOffsets, lists + 1);
  std::fill_n(starts, lists + 1, 0);
  const auto each = [&](const auto& body) {
    for (int64_t i = 0; i < m; ++i) {
      const int64_t k = i / channels, list = window.number[k] * p.channels + i % channels;
      for (int32_t e = p.starts[i]; e < p.starts[i + 1]; ++e) body(e, k, list + p.inner[e] / n * channels);
    }
  };
  for (int64_t e = 0; e < p.starts[m]; ++e)
    if (p.inner[e] < 0 || p.inner[e] >= p.features || p.order[e] < 0 || p.order[e] >= p.entries) return false;
  each([&](int32_t, int64_t, int64_t list) { ++starts[list + 1]; });
  for (int64_t list = 0; list < lists; ++list) starts[list + 1] += starts[list];
  each([&](int32_t e, int64_t k, int64_t list) {
    const int64_t at = p.inner[e] * planes.length - window.shift[k];
    entries[starts[list]++] = {static_cast<int32_t>(at), widen(values[p.order[e]])};
  });
  for (int64_t list = lists; list > 0; --list) starts[list] = starts[list - 1];
  starts[0] = 0;

  const int64_t down = p.vertical.stride, across = p.horizontal.stride;
  parallel(pool, planes.tasks, [&](int64_t task) {
    const Planes::Task t = planes.at(task, p.images);
    float* g = scratch<float>(msbp::Slot::kTile, p.features * planes.length);
    float* tile = scratch<float>(msbp::Slot::kResult, p.channels * planes.block);
    load_planes(planes, t, static_cast<const Other*>(p.in), p.vertical.out, p.horizontal.out, p.features, 1, 1, {0, 0},
                planes.over, g);
    for (int64_t begin = 0; begin < planes.floats(t); begin += planes.block) {
      for (int64_t f = 0; f < down * across; ++f) {  // phases that are never read get zeros
        const Phase phase{f / across, f % across};
        int64_t number = 0;
        while (number < window.phases && (window.phase[number].row != phase.row || window.phase[number].column != phase.column))
          ++number;
        for (int64_t c = 0; c < p.channels; ++c) {
          const int32_t* bounds = number < window.phases ? starts + number * p.channels + c : nullptr;
          sum_shifted(entries + (bounds ? bounds[0] : 0), entries + (bounds ? bounds[1] : 0), g + planes.margin + begin,
                      tile + c * planes.block);
        }
        store_block(planes, t, begin, tile, p.vertical.size, p.horizontal.size, p.channels, down, across, phase, p.out);
      }
    }
  });
  return true;
}

template <typename Left, typename Right>
bool convolution_weight_gradient(const msbp::SparseConvolution& p, msbp::Pool& pool) {
  constexpr int V = kTileVectors;
  if (!are_lists(p.starts, p.features, p.entries)) return false;
  const int64_t of_x = Window::most_phases(p) * p.channels, entries = p.starts[p.features];
  const Planes planes(p, of_x + p.features);
  const Window window(p, planes);
  Shifted* lists = scratch<Shifted>(msbp::Slot::kLists, most(1, entries));
  if (!of_features<float>(p, planes, window, lists)) return false;
  // As many partial sums whatever the number of threads, so that it does not show in the result.
  const int64_t parts = least(planes.tasks, 16), tasks_a_part = ceil_div(planes.tasks, parts);
  float* partial = scratch<float>(msbp::Slot::kPartials, parts * entries);
  parallel(pool, parts, [&](int64_t part) {
    float* sums = partial + part * entries;
    std::memset(sums, 0, entries * sizeof(float));
    float* x = scratch<float>(msbp::Slot::kTile, window.phases * p.channels * planes.length);
    float* g = scratch<float>(msbp::Slot::kValues, p.features * planes.length);
    for (int64_t task = part * tasks_a_part; task < least(planes.tasks, (part + 1) * tasks_a_part); ++task) {
      const Planes::Task t = planes.at(task, p.images);
      load_input(p, planes, t, window, static_cast<const Left*>(p.in), x);
      load_planes(planes, t, static_cast<const Right*>(p.g), p.vertical.out, p.horizontal.out, p.features, 1, 1, {0, 0}, 0,
                  g);  // each row of g counts once
      for (int64_t begin = 0; begin < planes.floats(t); begin += planes.block) {
        const float* from = x + planes.margin + begin;
        for (int64_t o = 0; o < p.features; ++o) {
          Floats row[V];
          for (int v = 0; v < V; ++v) row[v] = load(g + o * planes.length + planes.margin + begin + v * VL);
          for (int32_t e = p.starts[o]; e < p.starts[o + 1]; ++e) {
            const float* other = from + lists[e].at;
            Floats even{}, odd{};
#pragma GCC unroll 8
            for (int v = 0; v < V; v += 2) {
              even += row[v] * load(other + v * VL);
              odd += row[v + 1] * load(other + (v + 1) * VL);
            }
            sums[e] += sum_by_halves(even + odd);
          }
        }
      }
    }
  });
  constexpr int64_t kEntriesATask = 4096;
  parallel(pool, ceil_div(most(1, p.entries), kEntriesATask), [&](int64_t task) {
    for (int64_t e = task * kEntriesATask; e < least(p.entries, (task + 1) * kEntriesATask); ++e) {
      float total = 0;  // of entries that are there to make patterns equally long
      for (int64_t part = 0; e < entries && part < parts; ++part) total += partial[part * entries + e];
      p.out[e] = total;
    }
  });
  return true;
}

}  // namespace
