"""The reference of `grad_input`: gather the kept rows, one dense product, scatter them back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Rows
from msbp_jax.kernels.rows.grad_input import dense
from msbp_jax.kernels.rows.ladder import climb
from msbp_jax.kernels.xla.dot import dot


def grad_input(
    cotangent: Rows, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    whole = lambda: dense.grad_input(cotangent, weight, feature_axis, precision, dtype)
    result = jax.eval_shape(whole)

    def product(at: jax.Array, kept: jax.Array) -> jax.Array:
        dx = dot(kept, weight, (((1,), (feature_axis,)), ((), ())), precision, dtype).astype(result.dtype)
        empty = jnp.zeros_like(dx, shape=result.shape)
        return empty.at[at].set(dx, mode="promise_in_bounds", unique_indices=True)

    return climb(cotangent, product, whole)
