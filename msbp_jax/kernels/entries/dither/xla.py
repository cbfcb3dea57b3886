"""The reference of `dither`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from msbp_jax.formats import accumulation_dtype
from msbp_jax.kernels.entries.noise import uniform


def dither(
    cotangent: Float[Array, "rows n"],
    row_numbers: UInt32[Array, " rows"],
    key: UInt32[Array, " 2"],
    step: Float[Array, ""],
    prunes: bool,
) -> tuple[Float[Array, "rows n"], Float[Array, " rows"]]:
    """See `msbp_jax.kernels.dither`."""
    dtype = accumulation_dtype(cotangent.dtype)
    noise = uniform(key, row_numbers, jnp.arange(cotangent.shape[1], dtype=jnp.uint32)).astype(dtype)
    g, step = cotangent.astype(dtype), step.astype(dtype)
    by = jnp.where(step > 0, step, 1)
    # Quotients, not products with the inverse: XLA may round a product and the sum after it once, or twice.
    if prunes:
        share = jnp.abs(g) / by
        drawn = jnp.where(noise < share, jnp.copysign(by, g), 0)
        made = jnp.where(share < 1, drawn, g)
    else:
        level = jnp.floor(g / by + noise)
        if cotangent.dtype.itemsize < 4:  # levels, which may be beyond what float16 holds
            most = jnp.finfo(cotangent.dtype).max.astype(dtype)
            made = jnp.where(jnp.isfinite(g), jnp.clip(level, -most, most), g)
        else:
            made = level * by
    made = jnp.where(step > 0, made, g).astype(cotangent.dtype)
    return made, jnp.sum(made != 0, axis=1, dtype=jnp.float32)
