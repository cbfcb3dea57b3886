"""`select` on a TPU, in two kernels and without a sort.

1. The place of every column among the kept ones. The k-th largest score is found by bisection on the bits of the
   scores, which are ordered like the scores themselves; places are counts of kept columns further left, which the
   matrix unit adds up: a product with a triangle of ones.
2. The kept entries. A TPU cannot gather along lanes, but its matrix unit moves them: a product with a matrix that has
   a single one in each column. Entries go through it byte by byte, so that their bits arrive as they were, NaN too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax._compat._pallas import pallas, pallas_tpu
from msbp_jax.formats import Columns, group_rows
from msbp_jax.kernels.columns.select import _pallas
from msbp_jax.kernels.pallas.kernel import Kernel, tpu_params
from msbp_jax.kernels.pallas.tiles import padded, tile_of
from msbp_jax.kernels.residual import Remembered

_LANES = 128
_GROUPS = 8  # whose places are found at once: one for each sublane of a register
_BLOCK_BYTES = 2 * 2**20


def select(cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None) -> Columns:
    """See `msbp_jax.kernels.select`."""
    return _pallas.select("tpu", kept_columns, cotangent, k, rows_per_group)


def kept_columns(
    g: Float[Array, "rows n"], remembered: Remembered | None, scores: Float[Array, "G n"], k: int, r: int
) -> tuple[Float[Array, "G r k"], Int[Array, "G k"]]:
    """Return the entries of `u = g + m` in the best columns, and which these are; see `KeptColumns`."""
    groups, n = scores.shape
    place = _places(jnp.pad(scores, ((0, 0), (0, -n % _LANES)), constant_values=-1), k)
    kept = (place >= 0).reshape(groups, -1, _LANES).sum(axis=2, dtype=jnp.int32)
    return _moved(g, remembered, place, jnp.cumsum(kept, axis=1) - kept, k, r)


def _places(scores: Float[Array, "G n"], k: int) -> Int[Array, "G n"]:
    """Return the place of each column among the k kept ones, -1 for the others; ties go to the lower column."""
    groups, n = scores.shape

    def body(scores_ref: Any, place_ref: Any) -> None:
        def at_least(bit: jax.Array, threshold: jax.Array) -> jax.Array:
            higher = threshold | (jnp.int32(1) << (30 - bit))
            return jnp.where(_count(_bits(scores_ref[...]) >= higher) >= k, higher, threshold)

        threshold = lax.fori_loop(0, 31, at_least, jnp.zeros((_GROUPS, 1), jnp.int32))
        ties_kept = k - _count(_bits(scores_ref[...]) > threshold)
        further_left = _ones(_iota((_LANES, _LANES), 0) < _iota((_LANES, _LANES), 1))

        def tile(i: jax.Array, before: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            lanes = pallas.ds(pallas.multiple_of(i * _LANES, _LANES), _LANES)
            bits = _bits(scores_ref[:, lanes])
            above, tie = bits > threshold, bits == threshold
            above_before, ties_before = (
                count + jnp.dot(_ones(mask), further_left, preferred_element_type=jnp.float32).astype(jnp.int32)
                for count, mask in zip(before, (above, tie), strict=True)
            )
            kept = above | (tie & (ties_before < ties_kept))
            place_ref[:, lanes] = jnp.where(kept, above_before + jnp.minimum(ties_before, ties_kept), -1)
            return before[0] + _count(above), before[1] + _count(tie)

        none = jnp.zeros((_GROUPS, 1), jnp.int32)
        lax.fori_loop(0, n // _LANES, tile, (none, none))

    block = pallas.BlockSpec((_GROUPS, n), lambda g: (g, 0))
    kernel = Kernel(
        body=body,
        name="msbp_places",
        platform="tpu",
        results=[((groups, n), jnp.int32)],
        grid=(pallas.cdiv(groups, _GROUPS),),
        params=tpu_params("parallel"),
        in_specs=[block],
        out_specs=[block],
        operations=groups * n * (64 + 4 * _LANES),
    )
    return kernel(scores)[0]


def _moved(
    g: Float[Array, "rows n"],
    remembered: Remembered | None,
    place: Int[Array, "G n_padded"],
    before: Int[Array, "G tiles"],
    k: int,
    r: int,
) -> tuple[Float[Array, "G r k"], Int[Array, "G k"]]:
    """Return the entries of the kept columns at their places, and the number of the column at each place."""
    groups, n = place.shape
    at_once = tile_of(r, max(16, _BLOCK_BYTES // (64 * n) * 16), 16)
    tiles = -(-r // at_once)
    blocks, specs = [padded(group_rows(g, r), 1, at_once, _LANES)], [pallas.BlockSpec((1, at_once, n), _rows)]
    if remembered is not None:
        memory, live = remembered
        blocks.append(padded(group_rows(live, r).astype(jnp.int32), 1, at_once, 1))
        specs.append(pallas.BlockSpec((1, at_once, 1), _rows))
        if memory.ndim == 2:
            blocks.append(padded(group_rows(memory, r), 1, at_once, _LANES))
            specs.append(specs[0])
        else:
            blocks.append(padded(memory[None, None], 1, 1, _LANES))
            specs.append(pallas.BlockSpec((1, 1, n), lambda g, t: (0, 0, 0)))
    planes = range(4 if g.dtype == jnp.float32 else 2)

    def body(*refs: Any) -> None:
        before_ref, place_ref, g_ref, *remembered_refs, values_ref, index_ref, moved_ref, number_ref = refs
        moved_ref[...] = jnp.zeros_like(moved_ref)
        number_ref[...] = jnp.zeros_like(number_ref)

        def tile(t: jax.Array, _: None) -> None:
            lanes = pallas.ds(pallas.multiple_of(t * _LANES, _LANES), _LANES)
            block = before_ref[0, 0, t] // _LANES
            places = pallas.ds(pallas.multiple_of(block * _LANES, _LANES), 2 * _LANES)
            target = _ones(place_ref[0, :, lanes] - block * _LANES == _iota((2 * _LANES, _LANES), 0))

            def move(numbers: jax.Array) -> jax.Array:
                """Carry integers up to 255, which bfloat16 holds exactly, from their columns to their places."""
                ones = numbers.astype(jnp.float32).astype(jnp.bfloat16)
                over = (((1,), (1,)), ((), ()))
                return lax.dot_general(ones, target, over, preferred_element_type=jnp.float32).astype(jnp.int32)

            u = g_ref[0, :, lanes].astype(jnp.float32)
            if remembered_refs:  # rows that pad the last group are not live
                live_ref, memory_ref = remembered_refs
                u = jnp.where(live_ref[0] > 0, u + memory_ref[0, :, lanes], jnp.zeros((), u.dtype))
            bits = _bits(u.astype(g.dtype).astype(jnp.float32))
            for shift in (24 - 8 * plane for plane in planes):
                byte = lax.shift_right_logical(bits, jnp.int32(shift)) & 255
                moved_ref[:, places] |= move(byte) << shift
            number = move(_iota((_GROUPS, _LANES), 1) + 1)[:1]
            number_ref[:, places] = jnp.where(number > 0, t * _LANES + number - 1, number_ref[:, places])

        lax.fori_loop(0, n // _LANES, tile, None)
        values_ref[0] = lax.bitcast_convert_type(moved_ref[:, :k], jnp.float32).astype(values_ref.dtype)
        index_ref[0] = number_ref[:, :k]

    width = k // _LANES * _LANES + 2 * _LANES
    kernel = Kernel(
        body=body,
        name="msbp_kept_entries",
        platform="tpu",
        results=[((groups, tiles * at_once, k), g.dtype), ((groups, 1, k), jnp.int32)],
        grid=(groups, tiles),
        params=tpu_params("parallel", "arbitrary"),
        in_specs=[
            pallas.BlockSpec((1, 1, n // _LANES), lambda g, t: (g, 0, 0), memory_space=pallas_tpu.SMEM),
            pallas.BlockSpec((1, 1, n), lambda g, t: (g, 0, 0)),
            *specs,
        ],
        out_specs=[pallas.BlockSpec((1, at_once, k), _rows), pallas.BlockSpec((1, 1, k), lambda g, t: (g, 0, 0))],
        scratch=[pallas_tpu.VMEM((at_once, width), jnp.int32), pallas_tpu.VMEM((1, width), jnp.int32)],
        operations=4 * _LANES * len(planes) * groups * tiles * at_once * n,
    )
    values, index = kernel(before[:, None], place[:, None], *blocks)
    return values[:, :r], index[:, 0]


def _rows(group: jax.Array, tile: jax.Array) -> tuple[Any, Any, int]:
    return group, tile, 0


def _bits(numbers: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(numbers, jnp.int32)


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask.astype(jnp.int32), axis=1, keepdims=True)


def _ones(mask: jax.Array) -> jax.Array:
    return mask.astype(jnp.float32).astype(jnp.bfloat16)
