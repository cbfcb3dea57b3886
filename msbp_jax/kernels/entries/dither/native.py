"""`dither` in native code: noise, rounding and counting in one pass."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from msbp_jax.kernels.native import calls


def dither(
    cotangent: Float[Array, "rows n"],
    row_numbers: UInt32[Array, " rows"],
    key: UInt32[Array, " 2"],
    step: Float[Array, ""],
    prunes: bool,
) -> tuple[Float[Array, "rows n"], Float[Array, " rows"]]:
    """See `msbp_jax.kernels.dither`."""
    calls.check(cotangent)
    rows, n = cotangent.shape
    operands = [cotangent, row_numbers, key, step.astype(jnp.float32)[None]]
    results = [((rows, n), cotangent.dtype), ((rows,), jnp.float32)]
    made, kept = calls.call("dither", operands, results, split=("native dither", rows, 1), prunes=prunes)
    return made, kept
