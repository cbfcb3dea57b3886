// What XLA calls for cotangents any of whose entries may be 0: their products, and how entries are made 0 by chance.
#include "handlers.h"
#include "matrices.h"

namespace msbp {
namespace {

ffi::Error dither(ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::AnyBuffer numbers_, ffi::AnyBuffer key_,
                  ffi::AnyBuffer step_, ffi::Result<ffi::AnyBuffer> out_, ffi::Result<ffi::AnyBuffer> kept_, bool prunes,
                  int64_t instruction_set) {
  const Operand values("cotangent", values_, 2), numbers("row numbers", numbers_, 1), key("key", key_, 1),
      step("step", step_, 1), out("result", *out_, 2), kept("entries kept", *kept_, 1);
  Check check;
  check.rank(values, 2);
  check.real(values);
  check.dtype(numbers, {ffi::DataType::U32}, "uint32");
  check.dtype(key, {ffi::DataType::U32}, "uint32");
  check.dtype(step, {ffi::DataType::F32}, "float32");
  check.dtype(out, {values.dtype}, "of the dtype of cotangent");
  check.dtype(kept, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  const int64_t rows = values.shape[0], n = values.shape[1];
  check.range("rows", rows, 1, kMost);
  check.range("n", n, 1, kMost);
  check.shape(numbers, {rows});
  check.shape(key, {2});
  check.shape(step, {1});
  check.shape(out, {rows, n});
  check.shape(kept, {rows});
  for (const Operand* operand : {&values, &numbers, &key, &step, &kept}) check.batch(*operand, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, rows * n);
  return for_each_of_batch(out.batch, [&](int64_t b) {
    Dither d{};
    d.values = values.at(b, out.batch);
    d.row_numbers = reinterpret_cast<const uint32_t*>(numbers.at(b, out.batch));
    d.key = reinterpret_cast<const uint32_t*>(key.at(b, out.batch));
    d.step = reinterpret_cast<const float*>(step.at(b, out.batch));
    d.bfloat16 = values.bfloat16(), d.prunes = prunes;
    d.rows = rows, d.n = n;
    d.out = out.at(b, out.batch);
    d.kept = reinterpret_cast<float*>(kept.at(b, out.batch));
    kernels->dither(d, pool);
  });
}

ffi::Error row_moments(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::Result<ffi::AnyBuffer> moments,
                       int64_t instruction_set) {
  return of_rows(&Kernels::row_moments, "moments", {3}, threads, values, moments, instruction_set, 0);
}

ffi::Error grad_input(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer scale, ffi::AnyBuffer weight,
                      ffi::Result<ffi::AnyBuffer> dx, bool features_last, int64_t instruction_set) {
  return multiply(By::kEntries, false, threads, values, scale, weight, dx, features_last, instruction_set);
}

ffi::Error grad_weight(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer scale, ffi::AnyBuffer inputs,
                       ffi::Result<ffi::AnyBuffer> dw, bool features_last, int64_t instruction_set) {
  return multiply(By::kEntries, true, threads, values, scale, inputs, dw, features_last, instruction_set);
}

XLA_FFI_DEFINE_HANDLER(dither_handler, dither,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<bool>("prunes")
                           .Attr<int64_t>("instruction_set"));

XLA_FFI_DEFINE_HANDLER(row_moments_handler, row_moments,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("instruction_set"));

XLA_FFI_DEFINE_HANDLER(grad_input_handler, grad_input, product_binding());

XLA_FFI_DEFINE_HANDLER(grad_weight_handler, grad_weight, product_binding());

}  // namespace

std::vector<Handler> entries_handlers() {
  return {{"msbp_dither", reinterpret_cast<void*>(dither_handler)},
          {"msbp_row_moments", reinterpret_cast<void*>(row_moments_handler)},
          {"msbp_entries_grad_input", reinterpret_cast<void*>(grad_input_handler)},
          {"msbp_entries_grad_weight", reinterpret_cast<void*>(grad_weight_handler)}};
}

}  // namespace msbp
