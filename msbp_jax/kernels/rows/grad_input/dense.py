"""`grad_input` as a dense product with the rows that are left out written as zeros, where most are kept."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from msbp_jax.formats import Rows
from msbp_jax.kernels.xla.dot import dot


def grad_input(
    cotangent: Rows, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    dx = dot(cotangent.materialize(), weight, (((1,), (feature_axis,)), ((), ())), precision, dtype)
    return dx.astype(dtype or dx.dtype)
