// The kernels for one instruction set. Compiled once for each, with other flags and another MSBP_KERNELS.
#include "kernels.h"

#include "convolution.h"
#include "dither.h"
#include "entries.h"
#include "groups.h"
#include "images.h"
#include "lists.h"
#include "rows.h"
#include "select.h"
#include "unpack.h"
#include "weights.h"

#ifndef MSBP_KERNELS
#define MSBP_KERNELS portable
#endif
#define MSBP_JOIN_(a, b) a##b
#define MSBP_JOIN(a, b) MSBP_JOIN_(a, b)
#define MSBP_TEXT_(a) #a
#define MSBP_TEXT(a) MSBP_TEXT_(a)

namespace {

// Groups load the weight once for all their rows, which pays from a few rows on, later if there is little to load.
bool by_lists(const msbp::Product& p) { return p.r < 8 || (p.r < 16 && p.k < 64); }

template <typename Value, typename Other>
void grad_input(const msbp::Product& p, msbp::Pool& pool) {
  by_lists(p) ? grad_input_by_lists<Value, Other>(p, pool) : grad_input_by_groups<Value, Other>(p, pool);
}

template <typename Value, typename Other>
void grad_weight(const msbp::Product& p, msbp::Pool& pool) {
  by_lists(p) ? grad_weight_by_lists<Value, Other>(p, pool) : grad_weight_by_groups<Value, Other>(p, pool);
}

// Returns body(first, second) with a number of each operand's type: float, or the bits of a bfloat16.
template <typename Body>
auto by_types(bool first_bfloat16, bool second_bfloat16, const Body& body) {
  if (first_bfloat16) return second_bfloat16 ? body(uint16_t{}, uint16_t{}) : body(uint16_t{}, float{});
  return second_bfloat16 ? body(float{}, uint16_t{}) : body(float{}, float{});
}

template <typename Product, typename Body>
void by_types(const Product& p, const Body& body) {
  by_types(p.values_bfloat16, p.other_bfloat16, body);
}

void grad_input(const msbp::Product& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { grad_input<decltype(value), decltype(other)>(p, pool); });
}

void grad_weight(const msbp::Product& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { grad_weight<decltype(value), decltype(other)>(p, pool); });
}

void rows_grad_input(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { rows_grad_input<decltype(value), decltype(other)>(p, pool); });
}

void rows_grad_weight(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { rows_grad_weight<decltype(value), decltype(other)>(p, pool); });
}

void entries_grad_input(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { entries_grad_input<decltype(value), decltype(other)>(p, pool); });
}

void entries_grad_weight(const msbp::MatrixProduct& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { entries_grad_weight<decltype(value), decltype(other)>(p, pool); });
}

bool weight_times(const msbp::WeightProduct& p, msbp::Pool& pool) {
  return by_types(p.values_bfloat16, p.in_bfloat16,
                  [&](auto a, auto b) { return weight_times<decltype(a), decltype(b)>(p, pool); });
}

bool weight_gradient(const msbp::WeightGradient& p, msbp::Pool& pool) {
  return by_types(p.x_bfloat16, p.g_bfloat16,
                  [&](auto a, auto b) { return weight_gradient<decltype(a), decltype(b)>(p, pool); });
}

bool unpack(const msbp::DenseWeight& p, msbp::Pool& pool) {
  return p.halves ? unpack<uint16_t>(p, pool) : unpack<float>(p, pool);
}

bool pack(const msbp::DenseWeight& p, msbp::Pool& pool) {
  return p.halves ? pack<uint16_t>(p, pool) : pack<float>(p, pool);
}

bool convolution(const msbp::SparseConvolution& p, msbp::Pool& pool) {
  return by_types(p.values_bfloat16, p.in_bfloat16,
                  [&](auto a, auto b) { return convolution<decltype(a), decltype(b)>(p, pool); });
}

bool convolution_input_gradient(const msbp::SparseConvolution& p, msbp::Pool& pool) {
  return by_types(p.values_bfloat16, p.in_bfloat16,
                  [&](auto a, auto b) { return convolution_input_gradient<decltype(a), decltype(b)>(p, pool); });
}

bool convolution_weight_gradient(const msbp::SparseConvolution& p, msbp::Pool& pool) {
  return by_types(p.in_bfloat16, p.g_bfloat16,
                  [&](auto a, auto b) { return convolution_weight_gradient<decltype(a), decltype(b)>(p, pool); });
}

void images_grad_input(const msbp::ImagesProduct& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { images_grad_input<decltype(value), decltype(other)>(p, pool); });
}

void images_grad_weight(const msbp::ImagesProduct& p, msbp::Pool& pool) {
  by_types(p, [&](auto value, auto other) { images_grad_weight<decltype(value), decltype(other)>(p, pool); });
}

void dither(const msbp::Dither& d, msbp::Pool& pool) {
  d.bfloat16 ? dither<uint16_t>(d, pool) : dither<float>(d, pool);
}

void row_moments(const msbp::OfRows& m, msbp::Pool& pool) {
  m.bfloat16 ? row_moments<uint16_t>(m, pool) : row_moments<float>(m, pool);
}

void live_rows(const msbp::OfRows& l, msbp::Pool& pool) {
  l.bfloat16 ? live_rows<uint16_t>(l, pool) : live_rows<float>(l, pool);
}

}  // namespace

namespace msbp {

const Kernels MSBP_JOIN(MSBP_KERNELS, _kernels) = {MSBP_TEXT(MSBP_KERNELS),
                                                   select,
                                                   grad_input,
                                                   grad_weight,
                                                   live_rows,
                                                   rows_grad_input,
                                                   rows_grad_weight,
                                                   dither,
                                                   row_moments,
                                                   entries_grad_input,
                                                   entries_grad_weight,
                                                   weight_times,
                                                   weight_gradient,
                                                   unpack,
                                                   pack,
                                                   largest,
                                                   convolution,
                                                   convolution_input_gradient,
                                                   convolution_weight_gradient,
                                                   images_grad_input,
                                                   images_grad_weight};

}  // namespace msbp
