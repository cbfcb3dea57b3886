"""`grad_weight` in native code.

The rows of dw are summed up in a tile in cache, and written once, zeros included, the way the weight is stored.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.native import calls


def grad_weight(
    cotangent: Columns, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`. Products are float32 throughout, whatever `precision` asks for."""
    del precision
    cotangent = cotangent.dequantized(inputs.dtype)
    calls.check(cotangent.values, inputs)
    calls.check_entries(cotangent.values.size)
    m, n = inputs.shape[1], cotangent.shape[1]
    results = [((m, n) if feature_axis == 1 else (n, m), jnp.float32)]
    operands = [cotangent.values, cotangent.index, inputs]
    split = ("native grad_weight", cotangent.shape[0], cotangent.rows_per_group)
    (dw,) = calls.call("grad_weight", operands, results, split=split, features_last=feature_axis == 1)
    return dw.astype(dtype or jnp.float32)
