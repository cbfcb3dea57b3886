"""The reference of `select_with_memory`: u = g + m, `select`, and what is left of u."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.select import xla
from msbp_jax.kernels.residual import add_memory, left_of, takes_part


def select_with_memory(
    cotangent: Float[Array, "rows n"], memory: Float[Array, ...], k: int, rows_per_group: int | None
) -> tuple[Columns, Float[Array, ...], Float[Array, ...]]:
    """See `msbp_jax.kernels.select_with_memory`."""
    return _remembering(lambda u: xla.select(u, k, rows_per_group), cotangent, memory)


def choose_over(
    k: int, names: tuple[str, ...], cotangent: Float[Array, "rows n"], memory: Float[Array, ...]
) -> tuple[Array, Array, Array, Array]:
    """Choose once for rows spread over the devices of the mesh axes `names`; return what the op does."""
    p, *left = _remembering(lambda u: xla.select_over(names, u, k), cotangent, memory)
    return p.values, p.index, *(left if memory.ndim == 2 else jax.lax.psum(left, names))


def _remembering(
    choose: Callable[[Array], Columns], cotangent: Float[Array, "rows n"], memory: Float[Array, ...]
) -> tuple[Columns, Float[Array, ...], Float[Array, ...]]:
    """Return what `choose` keeps of u = g + m, and what is left of u."""
    live = takes_part(cotangent)
    u = add_memory(cotangent, memory, live)
    p = choose(u)
    return p.astype(cotangent.dtype), *left_of(u, p, live, by_slot=memory.ndim == 2)
