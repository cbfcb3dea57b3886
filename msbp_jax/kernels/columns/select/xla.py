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


def select_over(names: tuple[str, ...], cotangent: Float[Array, "rows n"], k: int) -> Columns:
    """Choose once for rows spread over devices: the scores, n numbers, are summed over the mesh axes `names`."""
    scores = jnp.abs(cotangent).astype(accumulation_dtype(cotangent.dtype)).sum(axis=0)
    index = jnp.sort(lax.top_k(lax.psum(scores, names), k)[1])  # the order that native code returns
    return take_columns(cotangent, index[None], None)


def choose_over(k: int, names: tuple[str, ...], cotangent: Float[Array, "rows n"]) -> tuple[Array, Array]:
    """Return the values and index of `select_over`."""
    p = select_over(names, cotangent, k)
    return p.values, p.index
