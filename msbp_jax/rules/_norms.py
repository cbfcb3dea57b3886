"""Norms of the operands of a contraction, for the sparsifiers that want to see them; computed for no others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.rules._contraction import Side
from msbp_jax.rules._operation import Dims, Matrices, Operands, Operation, Shape

_AS_THEY_STAND = (Matrices.DIRECTLY, Matrices.BY_ENTRIES)


def norms(
    wants: Sequence[str], operation: Operation, operands: Operands, side: Side, dims: Dims, out: Shape
) -> dict[str, jax.Array]:
    """Return what is wanted, by name, float32, with a leading axis `[batch]`.

    Args:
      wants: `"input_norms"`, of what each row of the output is made from, `[batch, rows]`; `"weight_norms"`, of each
        feature's weights, `[batch, n]`.
      operation: The contraction.
      operands: Its operands.
      side: Which of them is the weight.
      dims: Canonical sizes.
      out: Shape of the result.
    """
    made = {"input_norms": _input_norms, "weight_norms": _weight_norms}
    return {name: made[name](operation, operands, side, dims, out) for name in wants}


def _input_norms(
    operation: Operation, operands: Operands, side: Side, dims: Dims, out: Shape
) -> Float[Array, "batch rows"]:
    lhs, rhs = operands[0].shape, operands[1].shape
    if operation.matrices_by(lhs, rhs, None) in _AS_THEY_STAND:
        return _norm(operation.as_matrices(operands, out).x, 2)
    # A contraction with ones sums what an output is made from; one feature is enough where it can be cut out.
    x, w, *others = (operand.astype(jnp.float32) if i < 2 else operand for i, operand in enumerate(operands))
    kernel = jax.lax.slice_in_dim(w, 0, 1, axis=operation.feature_axis) if operation.narrows else w
    ones = jnp.ones_like(kernel)
    sums = operation.canonical_g(operation.forward(x * x, ones, *others), operands)
    return jnp.sqrt(sums[..., 0].reshape(dims.batch, dims.rows))


def _weight_norms(
    operation: Operation, operands: Operands, side: Side, dims: Dims, out: Shape
) -> Float[Array, "batch n"]:
    w = operands[0 if side == "lhs" else 1]
    if operation.matrices_by(operands[0].shape, operands[1].shape, None) in _AS_THEY_STAND:
        matrices = operation.as_matrices(operands, out)
        return _norm(matrices.w, 1 if matrices.feature_axis == 1 else 2)
    features_first = jnp.moveaxis(w, operation.feature_axis, 0)
    return _norm(features_first.reshape(1, dims.n, math.prod(w.shape) // dims.n), 2)


def _norm(x: Float[Array, ...], axis: int) -> Float[Array, ...]:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis))
