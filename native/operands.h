// What the handlers of XLA's calls share: arrays with batch axes, and checks of them.
#pragma once

#include <limits>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace msbp {
namespace {

std::string text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// An array with leading batch axes, each of which may have size 1 where another operand's does not.
struct Operand {
  const char* name;
  char* data;
  ffi::DataType dtype;
  std::vector<int64_t> shape;  // without the batch axes
  std::vector<int64_t> batch;
  int64_t bytes;  // of one element of the batch

  template <typename Buffer>
  Operand(const char* name, const Buffer& buffer, size_t rank)
      : name(name), data(static_cast<char*>(buffer.untyped_data())), dtype(buffer.element_type()), bytes(0) {
    const auto dims = buffer.dimensions();
    const size_t lead = dims.size() < rank ? 0 : dims.size() - rank;
    batch.assign(dims.begin(), dims.begin() + lead);
    shape.assign(dims.begin() + lead, dims.end());
    bytes = static_cast<int64_t>(ffi::ByteWidth(dtype));
    for (const int64_t size : shape) bytes *= size;
  }

  bool bfloat16() const { return dtype == ffi::DataType::BF16; }

  // Element `b` of the batch, counted over `whole`.
  char* at(int64_t b, const std::vector<int64_t>& whole) const {
    int64_t offset = 0, step = 1;
    for (size_t axis = whole.size(); axis-- > 0;) {
      const int64_t place = b % whole[axis];
      b /= whole[axis];
      if (batch[axis] != 1) offset += place * step;
      step *= batch[axis];
    }
    return data + offset * bytes;
  }
};

// Collects the first thing that is wrong.
class Check {
 public:
  void dtype(const Operand& a, std::initializer_list<ffi::DataType> allowed, const char* expected) {
    for (const ffi::DataType type : allowed)
      if (a.dtype == type) return;
    fail(std::string(a.name) + " must be " + expected + ", got XLA's element type " +
         std::to_string(static_cast<int>(a.dtype)));
  }
  void real(const Operand& a) { dtype(a, {ffi::DataType::F32, ffi::DataType::BF16}, "float32 or bfloat16"); }
  void shape(const Operand& a, const std::vector<int64_t>& expected) {
    if (a.shape != expected) fail(std::string(a.name) + " must have shape " + text(expected) + ", got " + text(a.shape));
  }
  void rank(const Operand& a, size_t rank) {
    if (a.shape.size() != rank) fail(std::string(a.name) + " must have at least " + std::to_string(rank) + " axes");
  }
  void range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      fail(std::string(name) + " must be between " + std::to_string(low) + " and " + std::to_string(high) + ", got " +
           std::to_string(value));
  }
  void batch(const Operand& a, const std::vector<int64_t>& whole) {
    bool fits = a.batch.size() == whole.size();
    for (size_t i = 0; fits && i < whole.size(); ++i) fits = a.batch[i] == whole[i] || a.batch[i] == 1;
    if (!fits) fail(std::string(a.name) + " must have batch axes " + text(whole) + " (or 1), got " + text(a.batch));
  }
  bool good() const { return error_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument("msbp_jax: " + error_); }
  void fail(std::string what) {
    if (error_.empty()) error_ = std::move(what);
  }

 private:
  std::string error_;
};

const Kernels* kernels_of(int64_t instruction_set, Check& check) {
  int64_t count = 0;
  while (available()[count] != nullptr) ++count;
  check.range("instruction_set", instruction_set, 0, count - 1);
  return check.good() ? available()[instruction_set] : nullptr;
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes) total *= size;
  return total;
}

template <typename Body>
ffi::Error for_each_of_batch(const std::vector<int64_t>& batch, const Body& body) {
  try {
    for (int64_t b = 0; b < product(batch); ++b) body(b);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "msbp_jax: no memory for the scratch of a sparse kernel");
  }
  return ffi::Error::Success();
}

const int32_t* ints(const Operand& a, int64_t b, const std::vector<int64_t>& whole) {
  return reinterpret_cast<const int32_t*>(a.at(b, whole));
}

// Lists of a pattern: one axis, int32.
void check_lists(Check& check, std::initializer_list<const Operand*> lists) {
  for (const Operand* one : lists) check.rank(*one, 1);
  for (const Operand* one : lists) check.dtype(*one, {ffi::DataType::S32}, "int32");
}

// Like for_each_of_batch, of a body that returns whether the pattern is good.
template <typename Body>
ffi::Error for_each_pattern(const std::vector<int64_t>& batch, const Body& body) {
  bool good = true;
  const ffi::Error error = for_each_of_batch(batch, [&](int64_t b) { good &= body(b); });
  if (good) return error;
  return ffi::Error::InvalidArgument(
      "msbp_jax: a pattern's indices must be in range, its lists one behind the other, images addressable by 32 bits");
}

// How products are called: a compact cotangent of two arrays, and the weight or the inputs.
auto product_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<bool>("features_last")
      .Attr<int64_t>("instruction_set");
}

}  // namespace
}  // namespace msbp
