// What the handlers call: kernels, compiled once for each instruction set, over plain pointers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace msbp {

// Runs task(context, i) for i in [0, tasks), on several threads, and returns when all are done.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t threads() const = 0;
  virtual void run(int64_t tasks, void (*task)(void*, int64_t), void* context) = 0;
};

// Memory that a thread keeps from call to call, since fresh pages cost more than the work done in them. Blocks that are
// in use at the same time have different slots. 64-byte aligned; contents undefined.
enum class Slot { kTile, kResult, kRow, kLists, kOffsets, kColumns, kPartials, kValues, kKept, kCount };
void* scratch(Slot slot, size_t bytes);

// u = g (+ memory); for each group of r rows the k columns with the largest sum of |u|; their entries; what is left. Rows
// of g that are 0 get no memory and leave nothing.
struct Select {
  const void* gradient;  // [rows, n]
  bool bfloat16;         // of gradient and values
  const float* memory;   // [n], or [rows, n] if by_slot; null for none
  bool by_slot;
  int64_t rows, n, k, r;
  void* values;       // [groups, r, k]
  int32_t* index;     // [groups, k], ascending
  float* left;        // like memory: u without its kept entries, where it is finite, added up over rows unless by_slot
  float* live;        // how many rows took part, [1]; if by_slot, 1 for each that did, [rows]
};

// dx = p wT (other = w, out = dx [rows, m]) or dw = xT p (other = x [rows, m], out = dw).
struct Product {
  const void* values;    // [groups, r, k]
  const int32_t* index;  // [groups, k], each in [0, n)
  const void* other;
  bool values_bfloat16, other_bfloat16;
  bool features_last;  // w and dw are [m, n] rather than [n, m]
  int64_t groups, r, k, rows, m, n;
  float* out;
};

// dx = p wT (other = w, out = dx [rows, m]) or dw = xT p (other = x [rows, m], out = dw) of a cotangent that comes as a
// matrix, of which whole rows are kept: p[i] = weight[i] values[i], and 0 where the weight is 0; or any entries, those
// that are not 0: p = weight[0] values.
struct MatrixProduct {
  const void* values;   // [rows, n]
  const float* weight;  // [rows], or [1]
  const void* other;
  bool values_bfloat16, other_bfloat16;
  bool features_last;  // w and dw are [m, n] rather than [n, m]
  int64_t rows, m, n;
  float* out;
};

// Numbers of each row: live_rows, 1 if it has an entry that is not 0, else 0, [rows]; row_moments, how many entries are
// finite, 0 if all are 0, their mean, and the norm of what they differ from it by, [rows, 3].
struct OfRows {
  const void* values;  // [rows, n]
  bool bfloat16;
  int64_t rows, n;
  float* out;
};

// Entries made 0 by chance: see dither.h.
struct Dither {
  const void* values;           // [rows, n]
  const uint32_t* row_numbers;  // [rows], by which noise is told apart
  const uint32_t* key;          // [2]
  const float* step;            // [1]; 0 leaves everything as it is
  bool bfloat16;                // of values and out
  bool prunes;
  int64_t rows, n;
  void* out;    // [rows, n]: multiples of the step, or which multiples in bfloat16; pruned entries as they are
  float* kept;  // how many are not 0, [rows]
};

// out[i, list] = sum over the entries e of each list of values[order[e]] in[i, inner[e]]: see weights.h.
struct WeightProduct {
  const void* values;     // [entries]
  const int32_t* starts;  // [lists + 1]
  const int32_t* inner;   // [entries], ascending in a list
  const int32_t* order;   // [entries]; null for the order of the lists
  const void* in;         // [rows, inner_size]
  bool values_bfloat16, in_bfloat16;
  int64_t entries, lists, inner_size, rows;
  float* out;  // [rows, lists]
};

// out[e] = sum over rows of x[i, inner[e]] g[i, list], for the entries e of each list.
struct WeightGradient {
  const void* x;          // [rows, m]
  const void* g;          // [rows, n]
  const int32_t* starts;  // [n + 1]
  const int32_t* inner;   // [entries]
  bool x_bfloat16, g_bfloat16;
  int64_t entries, rows, m, n;
  float* out;  // [entries]
};

// A dense weight [m, n] and its entries: `in` are entries and `out` the weight, or the other way: see unpack.h.
struct DenseWeight {
  const int32_t* starts;  // [n + 1], of the lists of features
  const int32_t* inputs;  // [entries]
  const void* in;
  bool halves;  // two bytes a number, and not four
  int64_t m, n, entries;
  void* out;
};

// places [most] = those of the `count` largest of scores [size]: see unpack.h.
struct Largest {
  const float* scores;
  int64_t size, count, most;
  int32_t* places;
};

// An axis of the pixels that a window moves along.
struct WindowAxis {
  int64_t size, out;                 // pixels of x and of y
  int64_t window, stride, dilation;  // places, from one pixel of y to the next, from one place to the next
  int64_t before;                    // zeros before the first pixel; negative if some are cut off
};

// A convolution with a sparse kernel [window, channels / groups, features], by its entries: see convolution.h.
struct SparseConvolution {
  WindowAxis vertical, horizontal;
  int64_t images, channels, features, groups, entries;
  const void* values;     // [entries]
  const int32_t* starts;  // of lists of a feature, or for dx of an input: a place of the window and a channel
  const int32_t* inner;   // [entries]: inputs, or for dx features
  const int32_t* order;   // [entries], for dx
  const void* in;         // x [images, height, width, channels], or for dx g
  const void* g;          // [images, height, width, features], for dw
  bool values_bfloat16, in_bfloat16, g_bfloat16;
  float* out;
};

// dx or dw of a dense convolution with a kernel [window, channels, features], on the images that are kept: images.h.
struct ImagesProduct {
  WindowAxis vertical, horizontal;
  int64_t images, channels, features;
  const void* values;   // g [images, height, width, features]
  const float* weight;  // [images], 0 for one that is left out
  const void* other;    // the kernel, or for dw x [images, height, width, channels]
  bool values_bfloat16, other_bfloat16;
  float* out;
};

struct Kernels {
  const char* name;
  void (*select)(const Select&, Pool&);
  void (*grad_input)(const Product&, Pool&);
  void (*grad_weight)(const Product&, Pool&);
  void (*live_rows)(const OfRows&, Pool&);
  void (*rows_grad_input)(const MatrixProduct&, Pool&);
  void (*rows_grad_weight)(const MatrixProduct&, Pool&);
  void (*dither)(const Dither&, Pool&);
  void (*row_moments)(const OfRows&, Pool&);
  void (*entries_grad_input)(const MatrixProduct&, Pool&);
  void (*entries_grad_weight)(const MatrixProduct&, Pool&);
  bool (*weight_times)(const WeightProduct&, Pool&);      // false if an index is out of range
  bool (*weight_gradient)(const WeightGradient&, Pool&);  // the same
  bool (*unpack)(const DenseWeight&, Pool&);              // the same
  bool (*pack)(const DenseWeight&, Pool&);                // the same
  void (*largest)(const Largest&, Pool&);
  bool (*convolution)(const SparseConvolution&, Pool&);   // as weight_times
  bool (*convolution_input_gradient)(const SparseConvolution&, Pool&);
  bool (*convolution_weight_gradient)(const SparseConvolution&, Pool&);
  void (*images_grad_input)(const ImagesProduct&, Pool&);
  void (*images_grad_weight)(const ImagesProduct&, Pool&);
};

// Every instruction set that this build has and this processor runs, best first; the last is the portable one.
const Kernels* const* available();  // null-terminated

extern const Kernels portable_kernels;
#ifdef MSBP_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace msbp
