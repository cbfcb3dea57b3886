"""Rows in groups, and the dtypes that sums over them are made in: what formats and kernels both need."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from msbp_jax import _compat

Size = Any  # a number of rows: an int or, in programs for jax.export, a dimension variable


def accumulation_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype that sums of such entries are made in: float64 if one of them is, else float32."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32)


def finite(x: Float[Array, ...]) -> Float[Array, ...]:
    """Return the array with 0 for entries that are not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def group_rows(matrix: Shaped[Array, "rows n"], rows_per_group: Size | None) -> Shaped[Array, "G r n"]:
    """Cut the rows of a matrix into consecutive groups, the last one padded with rows of zeros.

    Args:
      matrix: `[rows, n]`.
      rows_per_group: `r`; None, or more than there are rows, gives one group.

    Returns:
      `[G, r, n]` with `G = ceil(rows / r)`; no group for no rows.
    """
    rows, n = matrix.shape
    groups, size = grouping(rows, rows_per_group)
    missing = groups * size - rows
    if missing != 0:
        matrix = jnp.pad(matrix, ((0, missing), (0, 0)))
    return matrix.reshape(groups, size, n)


def grouping(rows: Size, rows_per_group: Size | None) -> tuple[Size, Size]:
    """Return how many groups there are and of how many rows, the last one padded.

    Args:
      rows: How many rows there are; a dimension variable of `jax.export` will do.
      rows_per_group: `r`; None, or more than there are rows, for one group.
    """
    if _compat.is_symbolic(rows):  # whether there are fewer than r is not known
        return (1, rows) if rows_per_group is None else (-(-rows // rows_per_group), rows_per_group)
    size = max(1, rows if rows_per_group is None else min(rows_per_group, rows))
    return -(-rows // size), size
