"""`grad_input` on a TPU: the kept rows of wᵀ come from main memory one by one, while the matrix unit works on others.

Two blocks of rows take turns: while one is multiplied, the other is filled, by a copy for each row whose number stands
in scalar memory. bfloat16 rows lie in pairs there and cannot be copied singly, so that two of their columns make one
32-bit word: one pass over w, which also turns it round where it is stored `[m, n]`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num, UInt32

from msbp_jax._compat._pallas import pallas, pallas_tpu
from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.grad_input import _pallas
from msbp_jax.kernels.pallas.kernel import Kernel, tpu_params
from msbp_jax.kernels.pallas.products import common_dtype
from msbp_jax.kernels.pallas.tiles import padded, tile_of

_LANES = 128
_COLUMNS = 4096  # words of a row of wᵀ that are copied at once
_ROWS = 256  # of the gradient that are multiplied at once


def grad_input(
    cotangent: Columns, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    return _pallas.grad_input("tpu", _mapped_product, cotangent, weight, feature_axis, precision, dtype)


def _mapped_product(
    values: jax.Array, index: jax.Array, scale: jax.Array, w: jax.Array, precision: Any, dtype: Any
) -> jax.Array:
    """Return the product, with a rule for vmap: the groups of all are groups of one, their weights one above another.

    A weight in main memory, of which the kernel copies what it wants, cannot be cut into blocks for it.
    """
    mapped = jax.custom_batching.custom_vmap(functools.partial(_product, precision=precision, dtype=dtype))

    @mapped.def_vmap
    def _over_batch(size: int, batched: Sequence[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
        *of_groups, w = (
            array if is_batched or i == 3 else jnp.broadcast_to(array, (size, *array.shape))
            for i, (array, is_batched) in enumerate(zip(operands, batched, strict=True))
        )
        if batched[3]:
            first = jnp.arange(size, dtype=jnp.int32) * w.shape[1]
            of_groups[1] = of_groups[1] + first[:, None, None]
            w = w.reshape(-1, w.shape[2])
        dx = mapped(*(array.reshape(-1, *array.shape[2:]) for array in of_groups), w)
        return dx.reshape(size, -1, *dx.shape[1:]), True

    return mapped(values, index, scale, w)


def _product(
    values: Num[Array, "G r k"],
    index: jax.Array,
    scale: Float[Array, " G"],
    w: Float[Array, "n m"],
    precision: Any,
    dtype: Any,
) -> Float[Array, "G r m"]:
    groups, r, k = values.shape
    m = w.shape[1]
    halves = 2 if w.dtype == jnp.bfloat16 else 1
    width = tile_of(-(-m // halves), _COLUMNS, _LANES)
    words = _words(padded(w, 1, halves * width), width) if halves == 2 else padded(w, 1, width)
    depth = min(_LANES, -(-k // 8) * 8)
    height = tile_of(r, _ROWS, 16)
    # Padded values are 0, and padded indices repeat the group's last one, so that no other row is read.
    values = padded(values, 1, height, depth)
    index = padded(index, 1, depth, mode="edge")[:, None]
    grid = groups, words.shape[1] // width, values.shape[1] // height, values.shape[2] // depth
    steps = grid[0] * grid[1] * grid[2] * grid[3]

    def place(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return group, tile of columns and block of kept features of a step."""
        return step // (grid[1] * grid[2] * grid[3]), step // (grid[2] * grid[3]) % grid[1], step % grid[3]

    def number(*place: Any) -> Any:
        group, column, row, block = place
        return ((group * grid[1] + column) * grid[2] + row) * grid[3] + block

    def body(
        now_ref: Any, next_ref: Any, scale_ref: Any, values_ref: Any, w_ref: Any, dx_ref: Any, *scratch: Any
    ) -> None:
        rows_ref, total_ref, semaphores = scratch
        here = [pallas.program_id(axis) for axis in range(4)]
        step, block = number(*here), here[3]
        slot = step % 2

        def copy(index_ref: Any, step: jax.Array, j: jax.Array) -> Any:
            columns = pallas.ds(pallas.multiple_of(place(step)[1] * width, _LANES), width)
            return pallas_tpu.make_async_copy(
                w_ref.at[pallas.ds(index_ref[0, 0, j], 1), columns],
                rows_ref.at[step % 2, pallas.ds(j, 1)],
                semaphores.at[step % 2],
            )

        def start(index_ref: Any, step: jax.Array) -> None:
            lax.fori_loop(0, depth, lambda j, _: copy(index_ref, step, j).start(), None)

        pallas.when(step == 0)(lambda: start(now_ref, step))
        pallas.when(step + 1 < steps)(lambda: start(next_ref, step + 1))
        lax.fori_loop(0, depth, lambda j, _: copy(now_ref, step, j).wait(), None)

        @pallas.when(block == 0)
        def _clear() -> None:
            total_ref[...] = jnp.zeros_like(total_ref)

        rows = rows_ref[slot]
        for half in range(halves):
            part = rows if halves == 1 else _half(rows, half)
            kind = common_dtype(values_ref.dtype, part.dtype)
            total_ref[:, half * width : (half + 1) * width] += jnp.dot(
                values_ref[0].astype(kind),
                part.astype(kind),
                precision=precision,
                preferred_element_type=jnp.float32,
            )

        @pallas.when(block == grid[3] - 1)
        def _store() -> None:
            dx_ref[0] = (total_ref[...] * scale_ref[0, 0, 0]).astype(dx_ref.dtype)

    def next_block(*here: Any) -> tuple[Any, int, Any]:
        group, _, block = place(jnp.minimum(number(*here) + 1, steps - 1))
        return group, 0, block

    def block_now(group: Any, column: Any, row: Any, block: Any) -> tuple[Any, int, Any]:
        return group, 0, block

    scalars = pallas_tpu.SMEM
    kernel = Kernel(
        body=body,
        name="msbp_grad_input",
        platform="tpu",
        results=[((groups, values.shape[1], words.shape[1] * halves), dtype)],
        grid=grid,
        params=tpu_params("arbitrary", "arbitrary", "arbitrary", "arbitrary"),
        in_specs=[
            pallas.BlockSpec((1, 1, depth), block_now, memory_space=scalars),
            pallas.BlockSpec((1, 1, depth), next_block, memory_space=scalars),
            pallas.BlockSpec((1, 1, 1), lambda group, column, row, block: (group, 0, 0), memory_space=scalars),
            pallas.BlockSpec((1, height, depth), lambda group, column, row, block: (group, row, block)),
            pallas.BlockSpec(memory_space=pallas.ANY),
        ],
        out_specs=[
            pallas.BlockSpec((1, height, halves * width), lambda group, column, row, block: (group, row, column))
        ],
        scratch=[
            pallas_tpu.VMEM((2, depth, width), words.dtype),
            pallas_tpu.VMEM((height, halves * width), jnp.float32),
            pallas_tpu.SemaphoreType.DMA((2,)),
        ],
        operations=2 * groups * r * k * m,
        bytes_moved=grid[1] * values.nbytes
        + grid[2] * groups * k * m * w.dtype.itemsize
        + groups * r * m * jnp.dtype(dtype).itemsize,
    )
    return kernel(index, index, scale[:, None, None], values, words)[0][:, :r, :m]


def _words(w: Float[Array, "n m"], width: int) -> UInt32[Array, "n m_half"]:
    """Put columns `c` and `c + width` of each tile of `2 width` columns into one word, the first one low."""

    def high(part: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(part.astype(jnp.float32), jnp.uint32)

    tiles = [w[:, at : at + 2 * width] for at in range(0, w.shape[1], 2 * width)]
    return jnp.concatenate([high(tile[:, :width]) >> 16 | high(tile[:, width:]) for tile in tiles], axis=1)


def _half(words: UInt32[Array, "k width"], half: int) -> Float[Array, "k width"]:
    """Return the bfloat16 numbers in the low (0) or high (1) halves of words."""
    bits = words << 16 if half == 0 else words & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
