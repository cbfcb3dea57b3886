"""`grad_weight` as a dense product with the cotangent written out, for layers that no sparse path serves better."""

from __future__ import annotations

from typing import Any

from jax import lax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns, accumulation_dtype


def grad_weight(
    cotangent: Columns, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    p = cotangent.dequantized(inputs.dtype).materialize()
    accumulator = accumulation_dtype(p.dtype, inputs.dtype)
    over_rows = (((0,), (0,)), ((), ()))
    lhs, rhs = (inputs, p) if feature_axis == 1 else (p, inputs)
    dw = lax.dot_general(lhs, rhs, over_rows, precision=precision, preferred_element_type=accumulator)
    return dw.astype(dtype or accumulator)
