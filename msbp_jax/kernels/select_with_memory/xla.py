"""The reference of `select_with_memory`: u = g + m, `select`, and what is left of u, decayed and made finite."""

from __future__ import annotations

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
