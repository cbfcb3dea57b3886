"""The reference of `select_with_memory`: u = g + m, `select`, and what is left of u."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels._residual import add_memory, left_of, takes_part
from msbp_jax.kernels.select import xla


def select_with_memory(
    cotangent: Float[Array, "rows n"], memory: Float[Array, ...], k: int, rows_per_group: int | None
) -> tuple[Columns, Float[Array, ...], Float[Array, ...]]:
    """See `msbp_jax.kernels.select_with_memory`."""
    live = takes_part(cotangent)
    u = add_memory(cotangent, memory, live)
    p = xla.select(u, k, rows_per_group)
    return p.astype(cotangent.dtype), *left_of(u, p, live, by_slot=memory.ndim == 2)


def together(
    k: int, names: tuple[str, ...], cotangent: Float[Array, "rows n"], memory: Float[Array, ...]
) -> tuple[Array, Array, Array, Array]:
    """Choose once for rows spread over the devices of the mesh axes `names`; return what the op does."""
    live = takes_part(cotangent)
    u = add_memory(cotangent, memory, live)
    p = xla.select_over(names, u, k)
    by_slot = memory.ndim == 2
    left = left_of(u, p, live, by_slot=by_slot)
    return p.values.astype(cotangent.dtype), p.index, *(left if by_slot else jax.lax.psum(left, names))
