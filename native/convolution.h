// Convolutions with a sparse kernel, images with their channels last; nothing is unfolded.
//
//   y[o] at q       = sum over the entries (k, c, o) of w x[c] at q + shift(k)
//   dx[c] at q      = sum over the entries (k, c, o) of w g[o] at q - shift(k)
//   dw of (k, c, o) = sum over q of x[c] at q + shift(k) times g[o] at q
//
// The images are turned into planes, in which a place k of the window is one shift for all pixels: see planes.h.
#pragma once

#include <algorithm>

#include "planes.h"
#include "weights.h"

namespace {

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
  Pixels* phase;    // [phases]: what is read of each

  Window(const msbp::SparseConvolution& p, const Planes& planes) {
    places = p.vertical.window * p.horizontal.window;
    char* memory = scratch<char>(msbp::Slot::kColumns, places * (2 * sizeof(int64_t) + sizeof(Pixels)));
    shift = reinterpret_cast<int64_t*>(memory), number = shift + places;
    phase = reinterpret_cast<Pixels*>(number + places);
    for (int64_t k = 0; k < places; ++k) {
      const int64_t i = k / p.horizontal.window, j = k % p.horizontal.window;
      const int64_t down = Line::shift(p.vertical, i), across = Line::shift(p.horizontal, j);
      shift[k] = down * planes.horizontal.pitch + across;
      const Pixels whole = phase_of(p, Line::phase(p.vertical, i), Line::phase(p.horizontal, j));
      Pixels read = whole;
      read.top = most(0, down), read.bottom = least(whole.bottom, p.vertical.out + down);
      read.left = most(0, across), read.right = least(whole.right, p.horizontal.out + across);
      const bool reads = read.top < read.bottom && read.left < read.right;
      number[k] = number_of(whole);
      if (number[k] == phases) {
        if (!reads) read.bottom = read.top, read.right = read.left;
        phase[phases++] = read;
        continue;
      }
      if (!reads) continue;
      Pixels& known = phase[number[k]];
      known.top = least(known.top, read.top), known.bottom = most(known.bottom, read.bottom);
      known.left = least(known.left, read.left), known.right = most(known.right, read.right);
    }
  }
  int64_t number_of(const Pixels& own) const {
    int64_t at = 0;
    while (at < phases && !phase[at].same_phase(own)) ++at;
    return at;
  }
  static Pixels phase_of(const msbp::SparseConvolution& p, int64_t row, int64_t column) {
    const auto count = [](int64_t size, int64_t first, int64_t stride) {
      return first < size ? ceil_div(size - first, stride) : 0;
    };
    const int64_t bottom = count(p.vertical.size, row, p.vertical.stride);
    const int64_t right = count(p.horizontal.size, column, p.horizontal.stride);
    return {p.vertical.size,     p.horizontal.size, p.channels, p.vertical.stride,
            p.horizontal.stride, row,               column,     0,
            bottom,              0,                 right};
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
    load_planes(planes, t, x, window.phase[f], planes.over, to + f * p.channels * planes.length);
}

template <typename Value, typename Other>
bool convolution(const msbp::SparseConvolution& p, msbp::Pool& pool) {
  if (!are_lists(p.starts, p.features, p.entries)) return false;
  const Planes planes(p, Window::most_phases(p) * p.channels);
  if (!planes.addressable(Window::most_phases(p) * p.channels)) return false;
  const Window window(p, planes);
  Shifted* entries = scratch<Shifted>(msbp::Slot::kLists, most(1, p.starts[p.features]));
  if (!of_features<Value>(p, planes, window, entries)) return false;
  const Pixels of_y = Pixels::all(p.vertical.out, p.horizontal.out, p.features);
  parallel(pool, planes.tasks, [&](int64_t task) {
    const Planes::Task t = planes.at(task, p.images);
    float* x = scratch<float>(msbp::Slot::kTile, window.phases * p.channels * planes.length);
    float* tile = scratch<float>(msbp::Slot::kResult, p.features * planes.block);
    load_input(p, planes, t, window, static_cast<const Other*>(p.in), x);
    for (int64_t begin = 0; begin < planes.floats(t); begin += planes.block) {
      for (int64_t o = 0; o < p.features; ++o)
        sum_shifted(entries + p.starts[o], entries + p.starts[o + 1], x + planes.margin + begin,
                    tile + o * planes.block);
      store_block(planes, t, begin, tile, of_y, p.out);
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
  if (!planes.addressable(p.features)) return false;
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

  const Pixels of_y = Pixels::all(p.vertical.out, p.horizontal.out, p.features);
  const int64_t across = p.horizontal.stride, every = p.vertical.stride * across;
  parallel(pool, planes.tasks, [&](int64_t task) {
    const Planes::Task t = planes.at(task, p.images);
    float* g = scratch<float>(msbp::Slot::kTile, p.features * planes.length);
    float* tile = scratch<float>(msbp::Slot::kResult, p.channels * planes.block);
    load_planes(planes, t, static_cast<const Other*>(p.in), of_y, planes.over, g);
    for (int64_t begin = 0; begin < planes.floats(t); begin += planes.block) {
      for (int64_t f = 0; f < every; ++f) {
        const Pixels phase = Window::phase_of(p, f / across, f % across);
        const int64_t number = window.number_of(phase);  // a phase that nothing reads gets zeros
        for (int64_t c = 0; c < p.channels; ++c) {
          const int64_t list = number * p.channels + c;
          const bool is_read = number < window.phases;
          sum_shifted(entries + (is_read ? starts[list] : 0), entries + (is_read ? starts[list + 1] : 0),
                      g + planes.margin + begin, tile + c * planes.block);
        }
        store_block(planes, t, begin, tile, phase, p.out);
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
  if (!planes.addressable(of_x)) return false;
  const Window window(p, planes);
  Shifted* lists = scratch<Shifted>(msbp::Slot::kLists, most(1, entries));
  if (!of_features<float>(p, planes, window, lists)) return false;
  const Pixels of_y = Pixels::all(p.vertical.out, p.horizontal.out, p.features);
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
      load_planes(planes, t, static_cast<const Right*>(p.g), of_y, 0, g);  // each row of g counts once
      for (int64_t begin = 0; begin < planes.floats(t); begin += planes.block) {
        const float* from = x + planes.margin + begin;
        for (int64_t o = 0; o < p.features; ++o) {
          Floats row[V];
          for (int v = 0; v < V; ++v) row[v] = load(g + o * planes.length + planes.margin + begin + v * VL);
          for (int32_t e = p.starts[o]; e < p.starts[o + 1]; ++e) {
            sums[e] += times_row(row, from + lists[e].at);
          }
        }
      }
    }
  });
  constexpr int64_t kEntriesATask = 4096;
  parallel(pool, ceil_div(most(1, p.entries), kEntriesATask), [&](int64_t task) {
    for (int64_t e = task * kEntriesATask; e < least(p.entries, (task + 1) * kEntriesATask); ++e) {
      float total = 0;  // stays 0 for padding
      for (int64_t part = 0; e < entries && part < parts; ++part) total += partial[part * entries + e];
      p.out[e] = total;
    }
  });
  return true;
}

}  // namespace
