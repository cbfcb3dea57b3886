// What XLA calls for products with sparse weights.
#include "handlers.h"
#include "operands.h"

namespace msbp {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

ffi::Error times(ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::AnyBuffer starts_, ffi::AnyBuffer inner_,
                 ffi::AnyBuffer order_, ffi::AnyBuffer in_, ffi::Result<ffi::AnyBuffer> out_, bool ordered,
                 int64_t instruction_set) {
  const Operand values("values", values_, 1), starts("starts of lists", starts_, 1), inner("indices", inner_, 1),
      order("order", order_, 1), in("input", in_, 2), out("result", *out_, 2);
  Check check;
  check.rank(values, 1);
  check_lists(check, {&starts, &inner, &order});
  check.rank(in, 2);
  check.rank(out, 2);
  check.real(values);
  check.real(in);
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  WeightProduct p{};
  p.entries = values.shape[0], p.lists = starts.shape[0] - 1;
  p.rows = in.shape[0], p.inner_size = in.shape[1];
  p.values_bfloat16 = values.bfloat16(), p.in_bfloat16 = in.bfloat16();
  check.range("entries", p.entries, 1, kMost);
  check.range("lists", p.lists, 1, kMost);
  check.range("rows", p.rows, 1, kMost);
  check.range("size of the input", p.inner_size, 1, kMost);
  check.shape(inner, {p.entries});
  if (ordered) check.shape(order, {p.entries});
  check.shape(out, {p.rows, p.lists});
  for (const Operand* one : {&values, &starts, &inner, &order, &in}) check.batch(*one, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.entries * p.rows / 8);
  return for_each_pattern(out.batch, [&](int64_t b) {
    WeightProduct element = p;
    element.values = values.at(b, out.batch);
    element.starts = ints(starts, b, out.batch);
    element.inner = ints(inner, b, out.batch);
    element.order = ordered ? ints(order, b, out.batch) : nullptr;
    element.in = in.at(b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    return kernels->weight_times(element, pool);
  });
}

ffi::Error gradient(ffi::ThreadPool threads, ffi::AnyBuffer x_, ffi::AnyBuffer g_, ffi::AnyBuffer starts_,
                    ffi::AnyBuffer inner_, ffi::Result<ffi::AnyBuffer> out_, int64_t instruction_set) {
  const Operand x("inputs", x_, 2), g("cotangent", g_, 2), starts("starts of lists", starts_, 1),
      inner("indices", inner_, 1), out("result", *out_, 1);
  Check check;
  check.rank(x, 2);
  check.rank(g, 2);
  check.rank(out, 1);
  check_lists(check, {&starts, &inner});
  check.real(x);
  check.real(g);
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  WeightGradient p{};
  p.rows = x.shape[0], p.m = x.shape[1], p.n = g.shape[1], p.entries = inner.shape[0];
  p.x_bfloat16 = x.bfloat16(), p.g_bfloat16 = g.bfloat16();
  check.range("rows", p.rows, 1, kMost);
  check.range("m", p.m, 1, kMost);
  check.range("n", p.n, 1, kMost);
  check.range("entries", p.entries, 1, kMost);
  check.shape(g, {p.rows, p.n});
  check.shape(starts, {p.n + 1});
  check.shape(out, {p.entries});
  for (const Operand* one : {&x, &g, &starts, &inner}) check.batch(*one, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.entries * p.rows / 8);
  return for_each_pattern(out.batch, [&](int64_t b) {
    WeightGradient element = p;
    element.x = x.at(b, out.batch);
    element.g = g.at(b, out.batch);
    element.starts = ints(starts, b, out.batch);
    element.inner = ints(inner, b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    return kernels->weight_gradient(element, pool);
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
                           .Attr<bool>("ordered")
                           .Attr<int64_t>("instruction_set"));

XLA_FFI_DEFINE_HANDLER(gradient_handler, gradient,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("instruction_set"));

}  // namespace

std::vector<Handler> weights_handlers() {
  return {{"msbp_weight_times", reinterpret_cast<void*>(times_handler)},
          {"msbp_weight_gradient", reinterpret_cast<void*>(gradient_handler)}};
}

}  // namespace msbp
