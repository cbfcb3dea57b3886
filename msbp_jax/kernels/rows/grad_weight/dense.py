"""`grad_weight` as a dense product with the rows that are left out written as zeros, where most are kept."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from msbp_jax.formats import Rows
from msbp_jax.kernels.xla.dot import dot


def grad_weight(
    cotangent: Rows, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    p = cotangent.materialize()
    lhs, rhs = (inputs, p) if feature_axis == 1 else (p, inputs)
    dw = dot(lhs, rhs, (((0,), (0,)), ((), ())), precision, dtype)
    return dw.astype(dtype or dw.dtype)
