"""`select_with_memory` in native code: u = g + m is not stored, and what is left is summed while a row is in cache."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels import _native_calls
from msbp_jax.kernels.select_with_memory import xla


def select_with_memory(
    cotangent: Float[Array, "rows n"], memory: Float[Array, ...], decay: float, k: int, rows_per_group: int | None
) -> tuple[Columns, Float[Array, ...]]:
    """See `msbp_jax.kernels.select_with_memory`."""
    _native_calls.check(cotangent, memory)
    rows, n = cotangent.shape
    r = min(rows_per_group or rows, rows)
    groups = -(-rows // r)
    results = [((groups, r, k), cotangent.dtype), ((groups, k), jnp.int32), (memory.shape, jnp.float32)]
    values, index, new_memory = _native_calls.call(
        "select_with_memory",
        [cotangent, memory.astype(jnp.float32)],
        results,
        split=("select_with_memory by slot" if memory.ndim == 2 else "select_with_memory", rows, r),
        choose_together=functools.partial(xla.together, k, decay),
        k=k,
        rows_per_group=r,
        decay=float(decay),
        by_slot=memory.ndim == 2,
    )
    return Columns(values, index, (rows, n)), new_memory
