// Backward of a dense convolution, on the images that are kept: channels last, nothing unfolded. Images in float32 are
// read where they lie; those in bfloat16, and g if its features do not fill panels, are copied.
//
//   dx[q]          = sum over the places k of the window of g[p] w[k]T, where the window at p reads q at k
//   dw of place k  = sum over p of x[q]T g[p]
//
// Along a row of pixels what one place of the window reads lies at even distances, so that both are products of
// matrices as they lie in memory. Rows of g that meet nothing but zeros around the image are left out.
#pragma once

#include "rows.h"

namespace {

// Pixels of y for which a place of the window reads a pixel of x: [begin, end).
struct Reads {
  int64_t begin, end;

  Reads(const msbp::WindowAxis& a, int64_t place) {
    const int64_t first = a.before - place * a.dilation, last = first + a.size - 1;  // in steps of a pixel of x
    begin = most(0, ceil_div(most(first, 0), a.stride));
    end = last < 0 ? 0 : least(a.out, last / a.stride + 1);
    if (end < begin) end = begin;
  }
  static int64_t pixel(const msbp::WindowAxis& a, int64_t place, int64_t out) {
    return out * a.stride + place * a.dilation - a.before;
  }
};

// out[q * out_stride + (0, width)] += sum over t in [0, length) of a[q * a_stride + t] * panel[t].
template <int R>
MSBP_INLINE void add_rows(int64_t length, const float* a, int64_t a_stride, const float* panel, float* out,
                          int64_t out_stride, int64_t width) {
  constexpr int kBases = (R + 2) / 3;  // three rows from each: as many pointers as there are rows do not fit registers
  const float* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * a_stride;
  Floats total[R][kPanelVectors];
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q)
    for (int v = 0; v < kPanelVectors; ++v) total[q][v] = Floats{};
  for (int64_t t = 0; t < length; ++t) {
    Floats b[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) b[v] = load(panel + t * kPanel + v * VL);
#pragma GCC unroll 16
    for (int q = 0; q < R; ++q) {
      const Floats value = broadcast(base[q / 3][q % 3 * a_stride + t]);
      for (int v = 0; v < kPanelVectors; ++v) total[q][v] += value * b[v];
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q) add_panel(total[q], out + q * out_stride, width);
}

// A stretch of pixels of a row that a place of the window reads, and of g beside it.
struct Stretch {
  const float* x;
  const float* g;
  int64_t length;
};

// out[q * out_stride + (0, width)] += sum over all pixels of x[q] g[(0, width)].
template <int R>
MSBP_INLINE void add_outer(const Stretch* begin, const Stretch* end, int64_t channel, int64_t feature, int64_t x_step,
                           int64_t g_step, float* out, int64_t out_stride, int64_t width) {
  Floats total[R][kPanelVectors];
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q)
    for (int v = 0; v < kPanelVectors; ++v) total[q][v] = Floats{};
  for (const Stretch* s = begin; s != end; ++s) {
    const float* x = s->x + channel;
    const float* g = s->g + feature;
    for (int64_t t = 0; t < s->length; ++t, x += x_step, g += g_step) {
      Floats b[kPanelVectors];
      for (int v = 0; v < kPanelVectors; ++v) b[v] = load(g + v * VL);
#pragma GCC unroll 16
      for (int q = 0; q < R; ++q) {
        const Floats value = broadcast(x[q]);
        for (int v = 0; v < kPanelVectors; ++v) total[q][v] += value * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < R; ++q) add_panel(total[q], out + q * out_stride, width);
}

// The images that are kept as float32, rows padded to `padded` floats: where they lie if they are that already, else
// copied one behind the other.
struct Images {
  const float* data;
  int64_t floats;  // of an image
  const int32_t* where;  // [kept]; null for one behind the other

  const float* at(int64_t number) const { return data + (where ? where[number] : number) * floats; }

  template <typename T>
  static Images of(const T* array, const Kept& kept, int64_t pixels, int64_t row, int64_t padded, msbp::Slot slot,
                   msbp::Pool& pool) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (row == padded) return {array, pixels * row, kept.rows};
    }
    float* out = scratch<float>(slot, most(1, kept.count * pixels * padded));
    parallel(pool, kept.count, [&](int64_t task) {
      const T* from = array + kept.rows[task] * pixels * row;
      float* to = out + task * pixels * padded;
      for (int64_t i = 0; i < pixels; ++i) copy_row(from + i * row, row, to + i * padded, padded);
    });
    return {out, pixels * padded, nullptr};
  }
};

template <typename Value, typename Other>
void images_grad_input(const msbp::ImagesProduct& p, msbp::Pool& pool) {
  constexpr int64_t kFloatsATask = 64 * 1024;  // of g and dx together: half of the second-level cache
  const msbp::WindowAxis &down = p.vertical, &across = p.horizontal;
  const Kept kept = Kept::of(p.weight, p.images);
  const int64_t n = p.features, m = p.channels, row = across.size * m;
  parallel(pool, p.images, [&](int64_t image) {
    std::memset(p.out + image * down.size * row, 0, down.size * row * sizeof(float));
  });
  if (kept.count == 0) return;
  const Images g = Images::of(static_cast<const Value*>(p.values), kept, down.out * across.out, n, n,
                              msbp::Slot::kValues, pool);
  const Other* w = static_cast<const Other*>(p.other);
  const int64_t places = down.window * across.window, panels = ceil_div(m, kPanel);
  float* packed = scratch<float>(msbp::Slot::kPartials, places * panels * n * kPanel);
  parallel(pool, places * panels, [&](int64_t task) {
    const int64_t first = task % panels * kPanel, width = least(kPanel, m - first);
    float* panel = packed + task * n * kPanel;
    if (width < kPanel) std::memset(panel, 0, n * kPanel * sizeof(float));
    transpose(w + (task / panels * m + first) * n, n, width, n, panel, kPanel);
  });
  const int64_t rows = least(down.size, most(1, kFloatsATask / most(1, row + across.out * n)));
  const int64_t bands = ceil_div(down.size, rows);
  parallel(pool, kept.count * bands, [&](int64_t task) {
    const int64_t number = task / bands, top = task % bands * rows, bottom = least(down.size, top + rows);
    const float* from = g.at(number);
    float* to = p.out + kept.rows[number] * down.size * row;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * kPanel, width = least(kPanel, m - first);
      for (int64_t place = 0; place < places; ++place) {
        const int64_t i = place / across.window, j = place % across.window;
        const float* weights = packed + (place * panels + panel) * n * kPanel;
        const Reads line(down, i), pixels(across, j);
        const Blocks blocks(pixels.end - pixels.begin);
        for (int64_t a = line.begin; a < line.end; ++a) {
          const int64_t y = Reads::pixel(down, i, a);
          if (y < top || y >= bottom) continue;
          for (int64_t block = 0; block < blocks.number; ++block) {
            const int64_t b = pixels.begin + blocks.begin(block);
            with_rows<kBlockRows>(blocks.size(block), [&](auto size) {
              add_rows<size.value>(n, from + (a * across.out + b) * n, n, weights,
                                   to + y * row + Reads::pixel(across, j, b) * m + first, across.stride * m, width);
            });
          }
        }
      }
    }
  });
}

template <typename Value, typename Other>
void images_grad_weight(const msbp::ImagesProduct& p, msbp::Pool& pool) {
  constexpr int64_t kFloatsAtOnce = 64 * 1024;      // of x and g together: half of the second-level cache
  constexpr int64_t kSmall = 128 * 1024, kParts = 8;  // floats of dw of which each part of the images has its own
  constexpr int64_t kChannelsATask = 4 * kBlockRows;
  const msbp::WindowAxis &down = p.vertical, &across = p.horizontal;
  const Kept kept = Kept::of(p.weight, p.images);
  const int64_t n = p.features, m = p.channels, g_step = ceil_div(n, kPanel) * kPanel;
  const int64_t places = down.window * across.window, size = places * m * n;
  const Images g = Images::of(static_cast<const Value*>(p.values), kept, down.out * across.out, n, g_step,
                              msbp::Slot::kValues, pool);
  const Images x = Images::of(static_cast<const Other*>(p.other), kept, down.size * across.size, m, m,
                              msbp::Slot::kResult, pool);
  const int64_t lines = kept.count * down.out;  // rows of pixels of y, of all images that are kept
  const int64_t at_once = most(1, kFloatsAtOnce / most(1, across.out * g_step + across.size * m * down.stride));

  // Adds to out, which has all of dw, what some lines make of some channels of a place.
  const auto add = [&](int64_t place, int64_t channel, int64_t channels, int64_t from, int64_t to, float* out) {
    const int64_t i = place / across.window, j = place % across.window;
    const Reads line(down, i), pixels(across, j);
    Stretch* stretches = scratch<Stretch>(msbp::Slot::kLists, at_once);
    Stretch* end = stretches;
    for (int64_t l = from; l < to; ++l) {
      const int64_t number = l / down.out, a = l % down.out;
      if (a < line.begin || a >= line.end || pixels.begin == pixels.end) continue;
      const int64_t y = Reads::pixel(down, i, a), left = Reads::pixel(across, j, pixels.begin);
      *end++ = {x.at(number) + (y * across.size + left) * m,
                g.at(number) + (a * across.out + pixels.begin) * g_step, pixels.end - pixels.begin};
    }
    const Blocks blocks(channels);
    for (int64_t first = 0; first < n; first += kPanel) {
      for (int64_t block = 0; block < blocks.number; ++block) {
        const int64_t c = channel + blocks.begin(block);
        with_rows<kBlockRows>(blocks.size(block), [&](auto rows) {
          add_outer<rows.value>(stretches, end, c, first, across.stride * m, g_step, out + (place * m + c) * n + first,
                                n, least(kPanel, n - first));
        });
      }
    }
  };

  if (size <= kSmall) {
    const int64_t parts = least(kParts, most(1, lines));  // whatever the number of threads: it shows in the sums
    float* partial = scratch<float>(msbp::Slot::kPartials, parts * size);
    parallel(pool, parts, [&](int64_t part) {
      float* out = partial + part * size;
      std::memset(out, 0, size * sizeof(float));
      const int64_t last = (part + 1) * lines / parts;
      for (int64_t from = part * lines / parts; from < last; from += at_once)
        for (int64_t place = 0; place < places; ++place) add(place, 0, m, from, least(last, from + at_once), out);
    });
    for (int64_t e = 0; e < size; ++e) {
      float total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partial[part * size + e];
      p.out[e] = total;
    }
    return;
  }
  const int64_t pieces = ceil_div(m, kChannelsATask);
  parallel(pool, places * pieces, [&](int64_t task) {
    const int64_t place = task / pieces, piece = task % pieces;
    const int64_t channel = piece * m / pieces, channels = (piece + 1) * m / pieces - channel;
    std::memset(p.out + (place * m + channel) * n, 0, channels * n * sizeof(float));
    for (int64_t from = 0; from < lines; from += at_once)
      add(place, channel, channels, from, least(lines, from + at_once), p.out);
  });
}

}  // namespace
