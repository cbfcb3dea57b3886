"""The reference of `row_moments`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import accumulation_dtype, finite
from msbp_jax.kernels.residual import takes_part


def row_moments(cotangent: Float[Array, "rows n"]) -> Float[Array, "rows 3"]:
    """See `msbp_jax.kernels.row_moments`."""
    dtype = accumulation_dtype(cotangent.dtype)
    g, takes = cotangent.astype(dtype), jnp.isfinite(cotangent)
    count = jnp.sum(takes, axis=1, dtype=dtype)
    first = finite(g[:, :1])  # taken off before the sum, so that equal entries have themselves for a mean
    off = jnp.where(takes, g - first, 0)
    mean = first[:, 0] + off.sum(axis=1) / jnp.maximum(count, 1)
    size = jnp.max(jnp.abs(off), axis=1, initial=0)
    per_size = jnp.where(size > 1e-37, 1 / jnp.where(size > 1e-37, size, 1), 0)  # squares are of numbers around 1
    norm = size * jnp.linalg.norm(jnp.where(takes, g - mean[:, None], 0) * per_size[:, None], axis=1)
    return jnp.stack([jnp.where(takes_part(cotangent)[:, 0], count, 0), mean, norm], axis=1)
