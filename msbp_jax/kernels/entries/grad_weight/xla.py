"""The reference of `grad_weight`: the dense product of the matrix, in 8 bits where its levels have no more."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from msbp_jax.formats import Entries
from msbp_jax.kernels.entries.quantized import quantized_dot
from msbp_jax.kernels.xla.dot import dot


def grad_weight(
    cotangent: Entries, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    if cotangent.bits is not None:
        dw = quantized_dot(cotangent, inputs, (0, 0), dtype)  # [n, m]
        return dw if feature_axis == 0 else dw.T
    lhs, rhs = (inputs, cotangent.values) if feature_axis == 1 else (cotangent.values, inputs)
    numbers = (((0,), (0,)), ((), ()))
    if cotangent.scale is None:
        dw = dot(lhs, rhs, numbers, precision, dtype)
        return dw.astype(dtype or dw.dtype)
    dw = dot(lhs, rhs, numbers, precision, None)
    return (dw * cotangent.scale).astype(dtype or dw.dtype)
