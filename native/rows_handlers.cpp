// What XLA calls for cotangents of which whole rows are kept.
#include "handlers.h"
#include "operands.h"

namespace msbp {
namespace {

ffi::Error live_rows(ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::Result<ffi::AnyBuffer> live_,
                     int64_t instruction_set) {
  const Operand values("cotangent", values_, 2), live("which rows are live", *live_, 1);
  Check check;
  check.rank(values, 2);
  check.rank(live, 1);
  check.real(values);
  check.dtype(live, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  const int64_t rows = values.shape[0], n = values.shape[1];
  check.range("rows", rows, 1, std::numeric_limits<int32_t>::max());
  check.range("n", n, 1, std::numeric_limits<int32_t>::max());
  check.shape(live, {rows});
  check.batch(values, live.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, rows * 16);
  return for_each_of_batch(live.batch, [&](int64_t b) {
    kernels->live_rows({values.at(b, live.batch), values.bfloat16(), rows, n,
                        reinterpret_cast<float*>(live.at(b, live.batch))},
                       pool);
  });
}

ffi::Error multiply(ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::AnyBuffer weight_, ffi::AnyBuffer other_,
                    ffi::Result<ffi::AnyBuffer> out_, bool features_last, int64_t instruction_set, bool of_weight) {
  const Operand values("cotangent", values_, 2), weight("weight of rows", weight_, 1),
      other(of_weight ? "inputs" : "weight", other_, 2), out("result", *out_, 2);
  Check check;
  check.rank(values, 2);
  check.rank(weight, 1);
  check.rank(other, 2);
  check.rank(out, 2);
  check.real(values);
  check.real(other);
  check.dtype(weight, {ffi::DataType::F32}, "float32");
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  RowsProduct p{};
  p.features_last = features_last;
  p.rows = values.shape[0], p.n = values.shape[1];
  const Operand& matrix = of_weight ? out : other;  // oriented as the weight is
  p.m = matrix.shape[features_last ? 0 : 1];
  p.values_bfloat16 = values.bfloat16(), p.other_bfloat16 = other.bfloat16();
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check.range("rows", p.rows, 1, kMost);
  check.range("m", p.m, 1, kMost);
  check.range("n", p.n, 1, kMost);
  check.shape(weight, {p.rows});
  check.shape(matrix, features_last ? std::vector<int64_t>{p.m, p.n} : std::vector<int64_t>{p.n, p.m});
  check.shape(of_weight ? other : out, {p.rows, p.m});
  for (const Operand* operand : {&values, &weight, &other}) check.batch(*operand, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.rows * p.m / 4 + p.m * p.n / 4);
  return for_each_of_batch(out.batch, [&](int64_t b) {
    RowsProduct element = p;
    element.values = values.at(b, out.batch);
    element.weight = reinterpret_cast<const float*>(weight.at(b, out.batch));
    element.other = other.at(b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    of_weight ? kernels->rows_grad_weight(element, pool) : kernels->rows_grad_input(element, pool);
  });
}

ffi::Error grad_input(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer rows, ffi::AnyBuffer weight,
                      ffi::Result<ffi::AnyBuffer> dx, bool features_last, int64_t instruction_set) {
  return multiply(threads, values, rows, weight, dx, features_last, instruction_set, false);
}

ffi::Error grad_weight(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer rows, ffi::AnyBuffer inputs,
                       ffi::Result<ffi::AnyBuffer> dw, bool features_last, int64_t instruction_set) {
  return multiply(threads, values, rows, inputs, dw, features_last, instruction_set, true);
}

XLA_FFI_DEFINE_HANDLER(live_rows_handler, live_rows,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("instruction_set"));

XLA_FFI_DEFINE_HANDLER(grad_input_handler, grad_input, product_binding());

XLA_FFI_DEFINE_HANDLER(grad_weight_handler, grad_weight, product_binding());

}  // namespace

std::vector<Handler> rows_handlers() {
  return {{"msbp_live_rows", reinterpret_cast<void*>(live_rows_handler)},
          {"msbp_rows_grad_input", reinterpret_cast<void*>(grad_input_handler)},
          {"msbp_rows_grad_weight", reinterpret_cast<void*>(grad_weight_handler)}};
}

}  // namespace msbp
