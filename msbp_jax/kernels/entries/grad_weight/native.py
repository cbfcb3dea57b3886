"""`grad_weight` in native code: a list of entries for each column, times tiles of the inputs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Entries
from msbp_jax.kernels.native import calls


def grad_weight(
    cotangent: Entries, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`. Products are float32 throughout, whatever `precision` asks for."""
    del precision
    calls.check(cotangent.values, inputs)
    (rows, n), m = cotangent.shape, inputs.shape[1]
    calls.check_entries(rows * n)
    results = [((m, n) if feature_axis == 1 else (n, m), jnp.float32)]
    operands = [cotangent.values, cotangent.scale_or_one().astype(jnp.float32)[None], inputs]
    split = ("native entries grad_weight", rows, 1)
    (dw,) = calls.call("entries_grad_weight", operands, results, split=split, features_last=feature_axis == 1)
    return dw.astype(dtype or jnp.float32)
