"""The reference of `select_with_memory`: u = g + m, `select`, and what is left of u, decayed and made finite."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels._residual import add_memory, carried_on
from msbp_jax.kernels.select import xla


def select_with_memory(
    cotangent: Float[Array, "rows n"], memory: Float[Array, ...], decay: float, k: int, rows_per_group: int | None
) -> tuple[Columns, Float[Array, ...]]:
    """See `msbp_jax.kernels.select_with_memory`."""
    u = add_memory(cotangent, memory)
    p = xla.select(u, k, rows_per_group)
    return p.astype(cotangent.dtype), carried_on(u, p, decay, by_slot=memory.ndim == 2)


def together(
    k: int, decay: float, names: tuple[str, ...], cotangent: Float[Array, "rows n"], memory: Float[Array, ...]
) -> tuple[Array, Array, Array]:
    """Choose once for rows spread over devices along the mesh axes `names`; return values, index and memory."""
    u = add_memory(cotangent, memory)
    p = xla.select_over(names, u, k)
    by_slot = memory.ndim == 2
    left = carried_on(u, p, decay, by_slot=by_slot)
    return p.values.astype(cotangent.dtype), p.index, left if by_slot else jax.lax.pmean(left, names)
