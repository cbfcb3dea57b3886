"""`select` on a GPU, in two kernels and without a sort.

1. The kept columns of a group. The k-th largest score is found by bisection on the bits of the scores, which are
   ordered like the scores themselves; a running count then gives every kept column its place.
2. The kept entries, gathered from g.

Pallas lowers them to Triton here; nothing in them is particular to it but the sizes, powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax._compat._pallas import pallas
from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.select import _pallas
from msbp_jax.kernels.pallas.kernel import Kernel, triton_params
from msbp_jax.kernels.pallas.tiles import padded
from msbp_jax.kernels.residual import Remembered

_SCORES, _ROWS, _KEPT = 4096, 32, 64  # sizes of tiles


def select(cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None) -> Columns:
    """See `msbp_jax.kernels.select`."""
    return _pallas.select("gpu", kept_columns, cotangent, k, rows_per_group)


def kept_columns(
    g: Float[Array, "rows n"], remembered: Remembered | None, scores: Float[Array, "G n"], k: int, r: int
) -> tuple[Float[Array, "G r k"], Int[Array, "G k"]]:
    """Return the entries of `u = g + m` in the best columns, and which these are; see `KeptColumns`."""
    index = _best(scores, k)
    return _entries(g, remembered, index, r), index


def _best(scores: Float[Array, "G n"], k: int) -> Int[Array, "G k"]:
    """Return the columns with the k largest scores, in order; ties go to the lower column."""
    groups, n = scores.shape
    width = min(pallas.next_power_of_2(n), _SCORES)
    tiles = -(-n // width)

    def body(scores_ref: Any, index_ref: Any) -> None:
        group = pallas.program_id(0)

        def bits(tile: Any) -> jax.Array:
            return lax.bitcast_convert_type(scores_ref[group, pallas.ds(tile * width, width)], jnp.int32)

        def count(wanted: Callable[[jax.Array], jax.Array]) -> jax.Array:
            add = lambda tile, total: total + jnp.sum(wanted(bits(tile)).astype(jnp.int32))
            return lax.fori_loop(0, tiles, add, jnp.int32(0))

        def at_least(bit: jax.Array, threshold: jax.Array) -> jax.Array:
            higher = threshold | (jnp.int32(1) << (30 - bit))
            return jnp.where(count(lambda b: b >= higher) >= k, higher, threshold)

        threshold = lax.fori_loop(0, 31, at_least, jnp.int32(0))
        ties_kept = k - count(lambda b: b > threshold)

        def write(tile: jax.Array, before: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            here = bits(tile)
            above, tie = (here > threshold).astype(jnp.int32), (here == threshold).astype(jnp.int32)
            above_before, ties_before = (
                start + jnp.cumsum(mask) - mask for start, mask in zip(before, (above, tie), strict=True)
            )
            kept = (above > 0) | ((tie > 0) & (ties_before < ties_kept))
            # Columns that are not kept are written to one place after the last, which is cut off.
            place = jnp.where(kept, above_before + jnp.minimum(ties_before, ties_kept), k)
            index_ref[group, place] = tile * width + lax.broadcasted_iota(jnp.int32, (width,), 0)
            return before[0] + jnp.sum(above), before[1] + jnp.sum(tie)

        lax.fori_loop(0, tiles, write, (jnp.int32(0), jnp.int32(0)))

    kernel = Kernel(
        body=body,
        name="msbp_best_columns",
        platform="gpu",
        results=[((groups, k + 1), jnp.int32)],
        grid=(groups,),
        params=triton_params(warps=8, stages=1),
        operations=64 * groups * n,
    )
    return kernel(jnp.pad(scores, ((0, 0), (0, tiles * width - n)), constant_values=-1))[0][:, :k]


def _entries(
    g: Float[Array, "rows n"], remembered: Remembered | None, index: Int[Array, "G k"], r: int
) -> Float[Array, "G r k"]:
    """Return the entries of `u = g + m` in the columns that `index` names."""
    rows = g.shape[0]
    groups, k = index.shape
    height, width = min(_ROWS, pallas.next_power_of_2(r)), min(_KEPT, pallas.next_power_of_2(k))
    index = padded(index, 1, width, mode="edge")
    down, across = -(-r // height), index.shape[1] // width

    def body(index_ref: Any, g_ref: Any, *refs: Any) -> None:
        *remembered_refs, values_ref = refs
        group, i, j = (pallas.program_id(axis) for axis in range(3))
        at, kept = pallas.ds(i * height, height), pallas.ds(j * width, width)
        columns = index_ref[group, kept][None, :]
        place = group * r + i * height + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        row = jnp.minimum(place, rows - 1)
        u = g_ref[row, columns].astype(jnp.float32)
        if remembered_refs:
            memory_ref, live_ref = remembered_refs
            memory = memory_ref[row, columns] if len(memory_ref.shape) == 2 else memory_ref[columns]
            u = jnp.where(live_ref[row] > 0, u + memory, jnp.zeros((), u.dtype))
        values_ref[group, at, kept] = jnp.where(place < rows, u, jnp.zeros((), u.dtype)).astype(values_ref.dtype)

    kernel = Kernel(
        body=body,
        name="msbp_kept_entries",
        platform="gpu",
        results=[((groups, down * height, across * width), g.dtype)],
        grid=(groups, down, across),
        params=triton_params(warps=4, stages=1),
    )
    parts = [] if remembered is None else [remembered.memory, remembered.live[:, 0].astype(jnp.int32)]
    return kernel(index, g, *parts)[0][:, :r, :k]
