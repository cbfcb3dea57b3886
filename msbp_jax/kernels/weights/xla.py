"""The reference of products with a sparse weight: dense ones, of the weight with its zeros."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from msbp_jax.formats import accumulation_dtype
from msbp_jax.kernels.xla.dot import dot
from msbp_jax.weights import Pattern, gathered, scattered


def times(
    x: Float[Array, "rows inner"], values: Float[Array, " entries"], pattern: Pattern, turned: bool, precision: Any
) -> Float[Array, "rows outer"]:
    """See `msbp_jax.kernels.weights.times`."""
    w = scattered(pattern, values).reshape(pattern.matrix_shape)
    numbers = (((1,), (1 if turned else 0,)), ((), ()))
    return dot(x, w, numbers, precision, accumulation_dtype(x.dtype, values.dtype))


def gradient(
    x: Float[Array, "rows m"], g: Float[Array, "rows n"], pattern: Pattern, precision: Any
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.weights.gradient`."""
    whole = dot(x, g, (((0,), (0,)), ((), ())), precision, accumulation_dtype(x.dtype, g.dtype))
    return gathered(pattern, whole.reshape(pattern.shape))
