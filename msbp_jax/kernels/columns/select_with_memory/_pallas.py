"""What the Pallas backends share: the sums that give the scores give what is left, too, in the same pass over g."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.column_sums import column_sums, sum_left
from msbp_jax.kernels.columns.select._pallas import KeptColumns
from msbp_jax.kernels.columns.select_with_memory import xla
from msbp_jax.kernels.opaque.partition import Call, Shapes
from msbp_jax.kernels.pallas import calls
from msbp_jax.kernels.residual import Remembered, add_memory, left_of, takes_part


def select_and_remember(
    platform: str,
    kept_columns: KeptColumns,
    cotangent: Float[Array, "rows n"],
    memory: Float[Array, ...],
    k: int,
    rows_per_group: int | None,
) -> tuple[Columns, Float[Array, ...], Float[Array, ...]]:
    """Run `select_with_memory` with a platform's kernels, `(g, m, scores, k, r) -> values, index`."""
    calls.check(platform, cotangent.dtype)
    rows, n = cotangent.shape
    r = min(rows_per_group or rows, rows)
    by_slot = memory.ndim == 2

    def function(results: Shapes) -> Call:
        del results

        def call(g: jax.Array, memory: jax.Array) -> tuple[jax.Array, ...]:
            here = min(r, g.shape[0])
            live = takes_part(g)
            scores, sums = column_sums(g, Remembered(memory, live), here)
            values, index = kept_columns(g, Remembered(memory, live), scores, k, here)
            if not by_slot:
                return values, index, sum_left(sums, index), live.astype(jnp.float32).sum(axis=0)
            p = Columns(values, index, (g.shape[0], n))
            return values, index, *left_of(add_memory(g, memory, live), p, live, by_slot=True)

        return call

    groups = -(-rows // r)
    kept = [((groups, r, k), cotangent.dtype), ((groups, k), jnp.int32)]
    left = [(memory.shape, jnp.float32), ((rows, 1) if by_slot else (1,), jnp.float32)]
    values, index, *rest = calls.run(
        "select_with_memory",
        function,
        [cotangent, memory.astype(jnp.float32)],
        [*kept, *left],
        ("select_with_memory by slot" if by_slot else "select_with_memory", rows, r),
        functools.partial(xla.choose_over, k),
    )
    return Columns(values, index, (rows, n)), rest[0], rest[1]
