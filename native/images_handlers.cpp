// What XLA calls for the backward of dense convolutions on the images that are kept.
#include "handlers.h"
#include "window.h"

namespace msbp {
namespace {

ffi::Error backward(bool of_kernel, ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::AnyBuffer weight_,
                    ffi::AnyBuffer other_, ffi::Result<ffi::AnyBuffer> out_, Numbers axes, int64_t instruction_set) {
  const Operand values("cotangent", values_, 4), weight("weight of images", weight_, 1),
      other(of_kernel ? "images" : "kernel", other_, 4), out("result", *out_, 4);
  Check check;
  check.rank(values, 4);
  check.rank(weight, 1);
  check.rank(other, 4);
  check.rank(out, 4);
  check.real(values);
  check.real(other);
  check.dtype(weight, {ffi::DataType::F32}, "float32");
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  ImagesProduct p{};
  const Operand &x = of_kernel ? other : out, &kernel = of_kernel ? out : other;
  read_images(p, x.shape, values.shape, axes, check);
  if (!check.good()) return check.error();
  check.shape(kernel, {p.vertical.window, p.horizontal.window, p.channels, p.features});
  check.shape(weight, {p.images});
  for (const Operand* one : {&values, &weight, &other}) check.batch(*one, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  p.values_bfloat16 = values.bfloat16(), p.other_bfloat16 = other.bfloat16();
  const int64_t positions = p.images * p.vertical.out * p.horizontal.out;
  XlaPool pool(threads, positions * p.vertical.window * p.horizontal.window * p.channels * (p.features + 15) / 16);
  return for_each_of_batch(out.batch, [&](int64_t b) {
    ImagesProduct element = p;
    element.values = values.at(b, out.batch);
    element.weight = reinterpret_cast<const float*>(weight.at(b, out.batch));
    element.other = other.at(b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    (of_kernel ? kernels->images_grad_weight : kernels->images_grad_input)(element, pool);
  });
}

ffi::Error grad_input(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer weight, ffi::AnyBuffer kernel,
                      ffi::Result<ffi::AnyBuffer> dx, Numbers axes, int64_t instruction_set) {
  return backward(false, threads, values, weight, kernel, dx, axes, instruction_set);
}

ffi::Error grad_weight(ffi::ThreadPool threads, ffi::AnyBuffer values, ffi::AnyBuffer weight, ffi::AnyBuffer images,
                       ffi::Result<ffi::AnyBuffer> dw, Numbers axes, int64_t instruction_set) {
  return backward(true, threads, values, weight, images, dw, axes, instruction_set);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<Numbers>("axes")
      .Attr<int64_t>("instruction_set");
}

XLA_FFI_DEFINE_HANDLER(grad_input_handler, grad_input, binding());

XLA_FFI_DEFINE_HANDLER(grad_weight_handler, grad_weight, binding());

}  // namespace

std::vector<Handler> images_handlers() {
  return {{"msbp_images_grad_input", reinterpret_cast<void*>(grad_input_handler)},
          {"msbp_images_grad_weight", reinterpret_cast<void*>(grad_weight_handler)}};
}

}  // namespace msbp
