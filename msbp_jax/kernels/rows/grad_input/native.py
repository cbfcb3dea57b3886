"""`grad_input` in native code: kept rows are gathered while they are packed, and written where they belong."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Rows
from msbp_jax.kernels.native import calls
from msbp_jax.kernels.rows.axes import grad_input_axes


def grad_input(
    cotangent: Rows, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`. Products are float32 throughout, whatever `precision` asks for."""
    del precision
    calls.check(cotangent.values, weight)
    rows = cotangent.shape[0]
    results = [((rows, weight.shape[1 - feature_axis]), jnp.float32)]
    operands = [cotangent.values, cotangent.weight, weight]
    axes = grad_input_axes(feature_axis)
    (dx,) = calls.call("rows_grad_input", operands, results, by=axes, features_last=feature_axis == 1)
    return dx.astype(dtype or jnp.float32)
