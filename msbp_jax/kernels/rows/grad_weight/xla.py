"""The reference of `grad_weight`: gather the kept rows of both operands, one dense product."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.formats import Rows
from msbp_jax.kernels.opaque.axes import by_axes
from msbp_jax.kernels.rows.axes import grad_weight_axes
from msbp_jax.kernels.rows.grad_weight import dense
from msbp_jax.kernels.rows.ladder import climb
from msbp_jax.kernels.xla.dot import dot


def grad_weight(
    cotangent: Rows, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    if _compat.is_symbolic(cotangent.shape[0]):
        return dense.grad_weight(cotangent, inputs, feature_axis, precision, dtype)
    result = jax.eval_shape(lambda: dense.grad_weight(cotangent, inputs, feature_axis, precision, dtype))

    def local(values: jax.Array, weights: jax.Array, inputs: jax.Array) -> tuple[jax.Array]:
        p = dataclasses.replace(cotangent, values=values, weight=weights)

        def product(at: jax.Array, kept: jax.Array) -> jax.Array:
            x = jnp.take(inputs, at, axis=0, mode="clip")
            lhs, rhs = (x, kept) if feature_axis == 1 else (kept, x)
            return dot(lhs, rhs, (((0,), (0,)), ((), ())), precision, dtype).astype(result.dtype)

        return (climb(p, product, lambda: dense.grad_weight(p, inputs, feature_axis, precision, dtype)),)

    operands = cotangent.values, cotangent.weight, inputs
    (dw,) = by_axes(grad_weight_axes(feature_axis), [(result.shape, result.dtype)], lambda _: local, operands)
    return dw
