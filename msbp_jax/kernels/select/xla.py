"""The reference of `select`: scores by a reduction, then `lax.top_k`, which sends ties to the lower index."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax.formats import accumulation_dtype, group_rows


def select(cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None) -> Int[Array, "G k"]:
    """See `msbp_jax.kernels.select`."""
    magnitude = jnp.abs(cotangent).astype(accumulation_dtype(cotangent.dtype))
    return lax.top_k(group_rows(magnitude, rows_per_group).sum(axis=1), k)[1]
