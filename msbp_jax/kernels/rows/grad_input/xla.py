"""The reference of `grad_input`: gather the kept rows, one dense product, scatter them back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.formats import Rows
from msbp_jax.kernels.opaque.axes import by_axes
from msbp_jax.kernels.rows.axes import grad_input_axes
from msbp_jax.kernels.rows.grad_input import dense
from msbp_jax.kernels.rows.ladder import climb
from msbp_jax.kernels.xla.dot import dot


def grad_input(
    cotangent: Rows, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    if _compat.is_symbolic(cotangent.shape[0]):
        return dense.grad_input(cotangent, weight, feature_axis, precision, dtype)
    result = jax.eval_shape(lambda: dense.grad_input(cotangent, weight, feature_axis, precision, dtype))

    def local(values: jax.Array, weights: jax.Array, w: jax.Array) -> tuple[jax.Array]:
        p = dataclasses.replace(cotangent, values=values, weight=weights)

        def product(at: jax.Array, kept: jax.Array) -> jax.Array:
            dx = dot(kept, w, (((1,), (feature_axis,)), ((), ())), precision, dtype).astype(result.dtype)
            empty = jnp.zeros_like(dx, shape=(values.shape[0], w.shape[1 - feature_axis]))
            return empty.at[at].set(dx, mode="promise_in_bounds", unique_indices=True)

        return (climb(p, product, lambda: dense.grad_input(p, w, feature_axis, precision, dtype)),)

    operands = cotangent.values, cotangent.weight, weight
    (dx,) = by_axes(grad_input_axes(feature_axis), [(result.shape, result.dtype)], lambda _: local, operands)
    return dx
