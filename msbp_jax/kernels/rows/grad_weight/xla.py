"""The reference of `grad_weight`: gather the kept rows of both operands, one dense product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Rows
from msbp_jax.kernels.rows.grad_weight import dense
from msbp_jax.kernels.rows.ladder import climb
from msbp_jax.kernels.xla.dot import dot


def grad_weight(
    cotangent: Rows, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    whole = lambda: dense.grad_weight(cotangent, inputs, feature_axis, precision, dtype)
    result = jax.eval_shape(whole)

    def product(at: jax.Array, kept: jax.Array) -> jax.Array:
        x = jnp.take(inputs, at, axis=0, mode="clip")
        lhs, rhs = (x, kept) if feature_axis == 1 else (kept, x)
        return dot(lhs, rhs, (((0,), (0,)), ((), ())), precision, dtype).astype(result.dtype)

    return climb(cotangent, product, whole)
