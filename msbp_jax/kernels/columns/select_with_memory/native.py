"""`select_with_memory` in native code: u = g + m is not stored, and what is left is summed while a row is in cache."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.select_with_memory import xla
from msbp_jax.kernels.native import calls


def select_with_memory(
    cotangent: Float[Array, "rows n"], memory: Float[Array, ...], k: int, rows_per_group: int | None
) -> tuple[Columns, Float[Array, ...], Float[Array, ...]]:
    """See `msbp_jax.kernels.select_with_memory`."""
    calls.check(cotangent, memory)
    rows, n = cotangent.shape
    r = min(rows_per_group or rows, rows)
    groups = -(-rows // r)
    calls.check_entries(groups * r * k)
    by_slot = memory.ndim == 2
    kept = [((groups, r, k), cotangent.dtype), ((groups, k), jnp.int32)]
    left = [(memory.shape, jnp.float32), ((rows, 1) if by_slot else (1,), jnp.float32)]
    values, index, *rest = calls.call(
        "select_with_memory",
        [cotangent, memory.astype(jnp.float32)],
        [*kept, *left],
        split=("select_with_memory by slot" if by_slot else "select_with_memory", rows, r),
        choose_together=functools.partial(xla.choose_over, k),
        k=k,
        rows_per_group=r,
        by_slot=by_slot,
    )
    return Columns(values, index, (rows, n)), rest[0], rest[1]
