// What XLA calls for cotangents of which whole rows are kept.
#include "handlers.h"
#include "matrices.h"

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

ffi::Error grad_input(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer rows, ffi::AnyBuffer weight,
                      ffi::Result<ffi::AnyBuffer> dx, bool features_last, int64_t instruction_set) {
  return multiply(By::kRows, false, threads, values, rows, weight, dx, features_last, instruction_set);
}

ffi::Error grad_weight(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer rows, ffi::AnyBuffer inputs,
                       ffi::Result<ffi::AnyBuffer> dw, bool features_last, int64_t instruction_set) {
  return multiply(By::kRows, true, threads, values, rows, inputs, dw, features_last, instruction_set);
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
