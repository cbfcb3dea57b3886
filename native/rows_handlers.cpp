// What XLA calls for cotangents of which whole rows are kept.
#include "handlers.h"
#include "matrices.h"

namespace msbp {
namespace {

ffi::Error live_rows(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::Result<ffi::AnyBuffer> live,
                     int64_t instruction_set) {
  // Nearly every row shows in its first vector that it is.
  return of_rows(&Kernels::live_rows, "which rows are live", {}, threads, values, live, instruction_set, 16);
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
