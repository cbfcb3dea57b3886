"""`grad_input` in native code: a list of entries for each row, times tiles of the weight."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Entries
from msbp_jax.kernels.native import calls


def grad_input(
    cotangent: Entries, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`. Products are float32 throughout, whatever `precision` asks for."""
    del precision
    calls.check(cotangent.values, weight)
    rows, n = cotangent.shape
    calls.check_entries(rows * n)
    results = [((rows, weight.shape[1 - feature_axis]), jnp.float32)]
    operands = [cotangent.values, cotangent.scale_or_one().astype(jnp.float32)[None], weight]
    split = ("native entries grad_input", rows, 1)
    (dx,) = calls.call("entries_grad_input", operands, results, split=split, features_last=feature_axis == 1)
    return dx.astype(dtype or jnp.float32)
