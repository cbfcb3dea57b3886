"""`row_moments` in native code: twice over a row, of which the second time it is in the first-level cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.kernels.native import calls


def row_moments(cotangent: Float[Array, "rows n"]) -> Float[Array, "rows 3"]:
    """See `msbp_jax.kernels.row_moments`."""
    calls.check(cotangent)
    rows = cotangent.shape[0]
    results = [((rows, 3), jnp.float32)]
    (moments,) = calls.call("row_moments", [cotangent], results, split=("native row_moments", rows, 1))
    return moments
