"""`grad_input` in native code.

Tiles of the weight are packed so that a feature is contiguous, whichever way the weight is stored; groups of rows are
small dense products in registers, single rows are lists of features.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.native import calls


def grad_input(
    cotangent: Columns, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`. Products are float32 throughout, whatever `precision` asks for."""
    del precision
    cotangent = cotangent.dequantized(weight.dtype)
    calls.check(cotangent.values, weight)
    calls.check_entries(cotangent.values.size)
    results = [((cotangent.shape[0], weight.shape[1 - feature_axis]), jnp.float32)]
    operands = [cotangent.values, cotangent.index, weight]
    split = ("native grad_input", cotangent.shape[0], cotangent.rows_per_group)
    (dx,) = calls.call("grad_input", operands, results, split=split, features_last=feature_axis == 1)
    return dx.astype(dtype or jnp.float32)
