// What XLA calls for cotangents of which some columns are kept, and the module that hands all handlers to Python. A handler
// checks every argument, then runs the kernel once for each element of the leading batch axes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "handlers.h"
#include "operands.h"

namespace nb = nanobind;

namespace msbp {
namespace {

ffi::Error select(ffi::ThreadPool threads, const Operand& g, const Operand* memory, const Operand& values,
                  const Operand& index, const Operand* left, const Operand* live, int64_t k, int64_t r, bool by_slot,
                  int64_t instruction_set) {
  Check check;
  check.rank(g, 2);
  check.real(g);
  if (!check.good()) return check.error();
  const int64_t rows = g.shape[0], n = g.shape[1];
  check.range("rows", rows, 1, std::numeric_limits<int32_t>::max());
  check.range("n", n, 1, std::numeric_limits<int32_t>::max());
  check.range("k", k, 1, n);
  check.range("rows_per_group", r, 1, rows);
  if (!check.good()) return check.error();
  const int64_t groups = (rows + r - 1) / r;
  check.shape(values, {groups, r, k});
  check.shape(index, {groups, k});
  check.dtype(values, {g.dtype}, "of the dtype of cotangent");
  check.dtype(index, {ffi::DataType::S32}, "int32");
  check.batch(g, values.batch);
  check.batch(index, values.batch);
  if (memory != nullptr) {
    const std::vector<int64_t> shape = by_slot ? std::vector<int64_t>{rows, n} : std::vector<int64_t>{n};
    check.shape(*memory, shape);
    check.shape(*left, shape);
    check.shape(*live, by_slot ? std::vector<int64_t>{rows, 1} : std::vector<int64_t>{1});
    for (const Operand* operand : {memory, left, live}) {
      check.dtype(*operand, {ffi::DataType::F32}, "float32");
      check.batch(*operand, values.batch);
    }
  }
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, rows * n);
  return for_each_of_batch(values.batch, [&](int64_t b) {
    Select s{};
    s.gradient = g.at(b, values.batch);
    s.bfloat16 = g.bfloat16();
    s.by_slot = by_slot;
    s.rows = rows, s.n = n, s.k = k, s.r = r;
    s.values = values.at(b, values.batch);
    s.index = reinterpret_cast<int32_t*>(index.at(b, values.batch));
    if (memory != nullptr) {
      s.memory = reinterpret_cast<const float*>(memory->at(b, values.batch));
      s.left = reinterpret_cast<float*>(left->at(b, values.batch));
      s.live = reinterpret_cast<float*>(live->at(b, values.batch));
    }
    kernels->select(s, pool);
  });
}

ffi::Error select_plain(ffi::ThreadPool threads, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> values,
                        ffi::Result<ffi::AnyBuffer> index, int64_t k, int64_t r, int64_t instruction_set) {
  return select(threads, Operand("cotangent", g, 2), nullptr, Operand("values", *values, 3),
                Operand("index", *index, 2), nullptr, nullptr, k, r, false, instruction_set);
}

ffi::Error select_with_memory(ffi::ThreadPool threads, ffi::AnyBuffer g, ffi::AnyBuffer memory,
                              ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> index,
                              ffi::Result<ffi::AnyBuffer> left_, ffi::Result<ffi::AnyBuffer> live_, int64_t k,
                              int64_t r, bool by_slot, int64_t instruction_set) {
  const size_t rank = by_slot ? 2 : 1;
  const Operand remembered("memory", memory, rank), left("what is left", *left_, rank),
      live("which rows took part", *live_, rank);
  return select(threads, Operand("cotangent", g, 2), &remembered, Operand("values", *values, 3),
                Operand("index", *index, 2), &left, &live, k, r, by_slot, instruction_set);
}

ffi::Error multiply(ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::AnyBuffer index_, ffi::AnyBuffer other_,
                    ffi::Result<ffi::AnyBuffer> out_, bool features_last, int64_t instruction_set, bool weight) {
  const Operand values("values", values_, 3), index("index", index_, 2), other(weight ? "inputs" : "weight", other_, 2),
      out("result", *out_, 2);
  Check check;
  check.rank(values, 3);
  check.rank(index, 2);
  check.rank(other, 2);
  check.rank(out, 2);
  check.real(values);
  check.real(other);
  check.dtype(index, {ffi::DataType::S32}, "int32");
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  Product p{};
  p.groups = values.shape[0], p.r = values.shape[1], p.k = values.shape[2];
  const Operand& matrix = weight ? out : other;  // oriented as the weight is
  p.features_last = features_last;
  p.m = matrix.shape[features_last ? 0 : 1], p.n = matrix.shape[features_last ? 1 : 0];
  p.rows = (weight ? other : out).shape[0];
  p.values_bfloat16 = values.bfloat16(), p.other_bfloat16 = other.bfloat16();
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check.range("rows", p.rows, 1, kMost);
  check.range("m", p.m, 1, kMost);
  check.range("n", p.n, 1, kMost);
  check.range("k", p.k, 1, p.n);
  check.range("rows_per_group", p.r, 1, p.rows);
  if (!check.good()) return check.error();
  check.range("groups", p.groups, (p.rows + p.r - 1) / p.r, (p.rows + p.r - 1) / p.r);
  check.range("entries", p.groups * p.r * p.k, 1, kMost);
  check.shape(index, {p.groups, p.k});
  check.shape(weight ? other : out, {p.rows, p.m});
  check.batch(values, out.batch);
  check.batch(index, out.batch);
  check.batch(other, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  const auto* places = reinterpret_cast<const int32_t*>(index.data);
  uint32_t largest = 0;  // unsigned, so that a negative index is the largest
  const int64_t entries = product(index.batch) * p.groups * p.k;
  for (int64_t e = 0; e < entries; ++e) largest = static_cast<uint32_t>(places[e]) > largest ? places[e] : largest;
  check.range("index", static_cast<int32_t>(largest), 0, p.n - 1);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.rows * p.k * p.m / 8 + p.m * p.n + p.rows * p.m);
  return for_each_of_batch(out.batch, [&](int64_t b) {
    Product element = p;
    element.values = values.at(b, out.batch);
    element.index = reinterpret_cast<const int32_t*>(index.at(b, out.batch));
    element.other = other.at(b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    weight ? kernels->grad_weight(element, pool) : kernels->grad_input(element, pool);
  });
}

ffi::Error grad_input(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer index, ffi::AnyBuffer weight,
                      ffi::Result<ffi::AnyBuffer> dx, bool features_last, int64_t instruction_set) {
  return multiply(threads, values, index, weight, dx, features_last, instruction_set, false);
}

ffi::Error grad_weight(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer index, ffi::AnyBuffer inputs,
                       ffi::Result<ffi::AnyBuffer> dw, bool features_last, int64_t instruction_set) {
  return multiply(threads, values, index, inputs, dw, features_last, instruction_set, true);
}

XLA_FFI_DEFINE_HANDLER(select_handler, select_plain,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("k")
                           .Attr<int64_t>("rows_per_group")
                           .Attr<int64_t>("instruction_set"));

XLA_FFI_DEFINE_HANDLER(select_with_memory_handler, select_with_memory,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("k")
                           .Attr<int64_t>("rows_per_group")
                           .Attr<bool>("by_slot")
                           .Attr<int64_t>("instruction_set"));

XLA_FFI_DEFINE_HANDLER(grad_input_handler, grad_input, product_binding());

XLA_FFI_DEFINE_HANDLER(grad_weight_handler, grad_weight, product_binding());

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The native CPU kernels of msbp_jax, as handlers of XLA's foreign function interface.";
  module.def("handlers", [] {
    nb::dict all;
    all["msbp_select"] = nb::capsule(reinterpret_cast<void*>(select_handler));
    all["msbp_select_with_memory"] = nb::capsule(reinterpret_cast<void*>(select_with_memory_handler));
    all["msbp_grad_input"] = nb::capsule(reinterpret_cast<void*>(grad_input_handler));
    all["msbp_grad_weight"] = nb::capsule(reinterpret_cast<void*>(grad_weight_handler));
    for (const std::vector<Handler>& some :
         {rows_handlers(), entries_handlers(), weights_handlers(), unpack_handlers(), convolution_handlers(),
          images_handlers()})
      for (const Handler& handler : some) all[handler.name] = nb::capsule(handler.function);
    return all;
  });
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* const* kernels = available(); *kernels != nullptr; ++kernels) names.emplace_back((*kernels)->name);
    return names;
  });
}

}  // namespace msbp
