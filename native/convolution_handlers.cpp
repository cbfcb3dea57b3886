// What XLA calls for convolutions with sparse kernels.
#include "handlers.h"
#include "window.h"

namespace msbp {
namespace {

SparseConvolution geometry(const std::vector<int64_t>& x, const std::vector<int64_t>& y, Numbers axes, int64_t groups,
                           int64_t entries, Check& check) {
  SparseConvolution p{};
  read_images(p, x, y, axes, check);
  p.groups = groups, p.entries = entries;
  check.range("groups", groups, 1, 1 << 20);
  check.range("entries", entries, 1, kMost);
  if (check.good() && (p.channels % groups != 0 || p.features % groups != 0))
    check.fail("groups must divide channels and features");
  return p;
}

int64_t inputs(const SparseConvolution& p) {
  return p.vertical.window * p.horizontal.window * (p.channels / p.groups);
}

// y = x * w, or dx of g and w.
ffi::Error times(ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::AnyBuffer starts_, ffi::AnyBuffer inner_,
                 ffi::AnyBuffer order_, ffi::AnyBuffer in_, ffi::Result<ffi::AnyBuffer> out_, bool of_gradient,
                 Numbers axes, int64_t groups, int64_t instruction_set) {
  const Operand values("values", values_, 1), starts("starts of lists", starts_, 1), inner("indices", inner_, 1),
      order("order", order_, 1), in("images", in_, 4), out("result", *out_, 4);
  Check check;
  check.rank(values, 1);
  check_lists(check, {&starts, &inner, &order});
  check.rank(in, 4);
  check.rank(out, 4);
  check.real(values);
  check.real(in);
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  const Operand &x = of_gradient ? out : in, &y = of_gradient ? in : out;
  SparseConvolution p = geometry(x.shape, y.shape, axes, groups, values.shape[0], check);
  if (!check.good()) return check.error();
  p.values_bfloat16 = values.bfloat16(), p.in_bfloat16 = in.bfloat16();
  check.shape(inner, {p.entries});
  check.shape(starts, {(of_gradient ? inputs(p) : p.features) + 1});
  if (of_gradient) check.shape(order, {p.entries});
  for (const Operand* one : {&values, &starts, &inner, &order, &in}) check.batch(*one, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.entries * p.images * p.vertical.out * p.horizontal.out / 8);
  return for_each_pattern(out.batch, [&](int64_t b) {
    SparseConvolution element = p;
    element.values = values.at(b, out.batch);
    element.starts = ints(starts, b, out.batch);
    element.inner = ints(inner, b, out.batch);
    element.order = of_gradient ? ints(order, b, out.batch) : nullptr;
    element.in = in.at(b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    return (of_gradient ? kernels->convolution_input_gradient : kernels->convolution)(element, pool);
  });
}

ffi::Error gradient(ffi::ThreadPool threads, ffi::AnyBuffer x_, ffi::AnyBuffer g_, ffi::AnyBuffer starts_,
                    ffi::AnyBuffer inner_, ffi::Result<ffi::AnyBuffer> out_, Numbers axes, int64_t groups,
                    int64_t instruction_set) {
  const Operand x("images", x_, 4), g("cotangent", g_, 4), starts("starts of lists", starts_, 1),
      inner("indices", inner_, 1), out("result", *out_, 1);
  Check check;
  check.rank(x, 4);
  check.rank(g, 4);
  check.rank(out, 1);
  check_lists(check, {&starts, &inner});
  check.real(x);
  check.real(g);
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  SparseConvolution p = geometry(x.shape, g.shape, axes, groups, inner.shape[0], check);
  if (!check.good()) return check.error();
  p.in_bfloat16 = x.bfloat16(), p.g_bfloat16 = g.bfloat16();
  check.shape(starts, {p.features + 1});
  check.shape(out, {p.entries});
  for (const Operand* one : {&x, &g, &starts, &inner}) check.batch(*one, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.entries * p.images * p.vertical.out * p.horizontal.out / 8);
  return for_each_pattern(out.batch, [&](int64_t b) {
    SparseConvolution element = p;
    element.in = x.at(b, out.batch);
    element.g = g.at(b, out.batch);
    element.starts = ints(starts, b, out.batch);
    element.inner = ints(inner, b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    return kernels->convolution_weight_gradient(element, pool);
  });
}

XLA_FFI_DEFINE_HANDLER(times_handler, times,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<bool>("of_gradient")
                           .Attr<Numbers>("axes")
                           .Attr<int64_t>("groups")
                           .Attr<int64_t>("instruction_set"));

XLA_FFI_DEFINE_HANDLER(gradient_handler, gradient,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<Numbers>("axes")
                           .Attr<int64_t>("groups")
                           .Attr<int64_t>("instruction_set"));

}  // namespace

std::vector<Handler> convolution_handlers() {
  return {{"msbp_sparse_convolution", reinterpret_cast<void*>(times_handler)},
          {"msbp_sparse_convolution_gradient", reinterpret_cast<void*>(gradient_handler)}};
}

}  // namespace msbp
