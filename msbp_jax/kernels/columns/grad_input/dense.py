"""`grad_input` as a dense product with the cotangent written out, for layers that no sparse path serves better."""

from __future__ import annotations

from typing import Any

from jax import lax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns, accumulation_dtype


def grad_input(
    cotangent: Columns, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    p = cotangent.dequantized(weight.dtype).materialize()
    accumulator = accumulation_dtype(p.dtype, weight.dtype)
    over_features = (((1,), (feature_axis,)), ((), ()))
    dx = lax.dot_general(p, weight, over_features, precision=precision, preferred_element_type=accumulator)
    return dx.astype(dtype or accumulator)
