"""The reference of `select`: scores by a reduction, then `lax.top_k`, which sends ties to the lower index."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns, accumulation_dtype, group_rows, take_columns


def select(cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None) -> Columns:
    """See `msbp_jax.kernels.select`."""
    magnitude = jnp.abs(cotangent).astype(accumulation_dtype(cotangent.dtype))
    index = lax.top_k(group_rows(magnitude, rows_per_group).sum(axis=1), k)[1]
    return take_columns(cotangent, index, rows_per_group)
