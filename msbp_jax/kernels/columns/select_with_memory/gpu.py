"""`select_with_memory` on a GPU: the kernels of `select`, fed with g and m; u = g + m is not stored."""

from __future__ import annotations

from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.select.gpu import kept_columns
from msbp_jax.kernels.columns.select_with_memory._pallas import select_and_remember


def select_with_memory(
    cotangent: Float[Array, "rows n"], memory: Float[Array, ...], k: int, rows_per_group: int | None
) -> tuple[Columns, Float[Array, ...], Float[Array, ...]]:
    """See `msbp_jax.kernels.select_with_memory`."""
    return select_and_remember("gpu", kept_columns, cotangent, memory, k, rows_per_group)
