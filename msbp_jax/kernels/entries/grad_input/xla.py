"""The reference of `grad_input`: the dense product of the matrix, in 8 bits where its levels have no more."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from msbp_jax.formats import Entries
from msbp_jax.kernels.entries.quantized import quantized_dot
from msbp_jax.kernels.xla.dot import dot


def grad_input(
    cotangent: Entries, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    if cotangent.bits is not None:
        return quantized_dot(cotangent, weight, (1, feature_axis), dtype)
    numbers = (((1,), (feature_axis,)), ((), ()))
    if cotangent.scale is None:
        dx = dot(cotangent.values, weight, numbers, precision, dtype)
        return dx.astype(dtype or dx.dtype)
    dx = dot(cotangent.values, weight, numbers, precision, None)
    return (dx * cotangent.scale).astype(dtype or dx.dtype)
