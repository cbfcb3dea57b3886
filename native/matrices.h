// What XLA calls for a cotangent that comes as a matrix: numbers of its rows, and its products with a vector beside it.
#pragma once

#include "operands.h"

namespace msbp {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// Numbers of every row, each of shape `each`; `work_a_row` is a rough count of operations, 0 for one an entry.
ffi::Error of_rows(void (*Kernels::*kernel)(const OfRows&, Pool&), const char* name, std::vector<int64_t> each,
                   ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::Result<ffi::AnyBuffer> out_,
                   int64_t instruction_set, int64_t work_a_row) {
  const Operand values("cotangent", values_, 2), out(name, *out_, 1 + each.size());
  Check check;
  check.rank(values, 2);
  check.rank(out, 1 + each.size());
  check.real(values);
  check.dtype(out, {ffi::DataType::F32}, "float32");
  if (!check.good()) return check.error();
  const int64_t rows = values.shape[0], n = values.shape[1];
  check.range("rows", rows, 1, kMost);
  check.range("n", n, 1, kMost);
  each.insert(each.begin(), rows);
  check.shape(out, each);
  check.batch(values, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, rows * (work_a_row > 0 ? work_a_row : n));
  return for_each_of_batch(out.batch, [&](int64_t b) {
    (kernels->*kernel)({values.at(b, out.batch), values.bfloat16(), rows, n,
                        reinterpret_cast<float*>(out.at(b, out.batch))},
                       pool);
  });
}

enum class By { kRows, kEntries };

// Either product of a cotangent that comes as a matrix, with a weight for each row or one for all entries.
ffi::Error multiply(By by, bool of_weight, ffi::ThreadPool threads, ffi::AnyBuffer values_, ffi::AnyBuffer weight_,
                    ffi::AnyBuffer other_, ffi::Result<ffi::AnyBuffer> out_, bool features_last,
                    int64_t instruction_set) {
  const Operand values("cotangent", values_, 2), weight(by == By::kRows ? "weight of rows" : "scale", weight_, 1),
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
  MatrixProduct p{};
  p.features_last = features_last;
  p.rows = values.shape[0], p.n = values.shape[1];
  const Operand& matrix = of_weight ? out : other;  // oriented as the weight is
  p.m = matrix.shape[features_last ? 0 : 1];
  p.values_bfloat16 = values.bfloat16(), p.other_bfloat16 = other.bfloat16();
  check.range("rows", p.rows, 1, kMost);
  check.range("m", p.m, 1, kMost);
  check.range("n", p.n, 1, kMost);
  if (by == By::kEntries) check.range("entries", p.rows * p.n, 1, kMost);  // lists number them with 32 bits
  check.shape(weight, {by == By::kRows ? p.rows : 1});
  check.shape(matrix, features_last ? std::vector<int64_t>{p.m, p.n} : std::vector<int64_t>{p.n, p.m});
  check.shape(of_weight ? other : out, {p.rows, p.m});
  for (const Operand* operand : {&values, &weight, &other}) check.batch(*operand, out.batch);
  const Kernels* kernels = kernels_of(instruction_set, check);
  if (!check.good()) return check.error();
  XlaPool pool(threads, p.rows * p.m / 4 + p.m * p.n / 4);
  return for_each_of_batch(out.batch, [&](int64_t b) {
    MatrixProduct element = p;
    element.values = values.at(b, out.batch);
    element.weight = reinterpret_cast<const float*>(weight.at(b, out.batch));
    element.other = other.at(b, out.batch);
    element.out = reinterpret_cast<float*>(out.at(b, out.batch));
    const auto kernel = by == By::kRows ? (of_weight ? kernels->rows_grad_weight : kernels->rows_grad_input)
                                        : (of_weight ? kernels->entries_grad_weight : kernels->entries_grad_input);
    kernel(element, pool);
  });
}

}  // namespace
}  // namespace msbp
