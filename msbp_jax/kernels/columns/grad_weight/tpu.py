"""`grad_weight` on a TPU: rows of dw are added up in fast memory, and written once, zeros included.

The products of a group, `valuesᵀ x`, come from the matrix unit and are added where they belong row by row; a row of
1,024 numbers is laid out as one register, so that adding it is one instruction. A tile of dw stays in fast memory while
all groups pass by, and leaves it the way the weight is stored.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from msbp_jax._compat._pallas import pallas, pallas_tpu
from msbp_jax.formats import Columns, group_rows
from msbp_jax.kernels.columns.grad_weight import _pallas
from msbp_jax.kernels.pallas.kernel import Kernel, tpu_params
from msbp_jax.kernels.pallas.products import common_dtype
from msbp_jax.kernels.pallas.tiles import padded, tile_of

_LANES, _SUBLANES = 128, 8  # of a register
_ROWS = 512  # of x that are multiplied at once
_TILE_BYTES = 24 * 2**20


def grad_weight(
    cotangent: Columns,
    inputs: Float[Array, "rows m"],
    feature_axis: int,
    precision: Any = None,
    dtype: Any = None,
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    return _pallas.grad_weight("tpu", _product, cotangent, inputs, feature_axis, precision, dtype)


def _product(
    values: Num[Array, "G r k"],
    index: Int[Array, "G k"],
    scale: Float[Array, " G"],
    x: Float[Array, "rows m"],
    n: int,
    feature_axis: int,
    precision: Any,
    dtype: Any,
) -> Float[Array, ...]:
    groups, r, k = values.shape
    m = x.shape[1]
    parts = min(_SUBLANES, -(-m // _LANES))  # rows of a register that a tile of m takes
    width = parts * _LANES
    most = _TILE_BYTES // (_SUBLANES * _LANES * 4 + 2 * width * jnp.dtype(dtype).itemsize)
    height = tile_of(n, most // _LANES * _LANES, _LANES)
    depth = min(_LANES, -(-k // 8) * 8)
    at_once = tile_of(r, _ROWS, 16)
    values = padded(values, 1, at_once, depth)
    index = padded(index, 1, depth, mode="edge")
    x = padded(group_rows(x, r), 1, at_once, width)
    grid = -(-n // height), x.shape[2] // width, groups, values.shape[1] // at_once, values.shape[2] // depth
    blocks = index.reshape(groups, 1, -1, depth)
    ends = jnp.stack([blocks.min(axis=3), blocks.max(axis=3)], axis=3).reshape(groups, 1, -1)

    def body(*refs: Any) -> None:
        index_ref, ends_ref, scale_ref, values_ref, x_ref, dw_ref, total_ref, rows_ref = refs
        tile, _, group, chunk, block = (pallas.program_id(axis) for axis in range(5))
        low = tile * height

        @pallas.when((group == 0) & (chunk == 0) & (block == 0))
        def _clear() -> None:
            total_ref[...] = jnp.zeros_like(total_ref)

        @pallas.when((ends_ref[0, 0, 2 * block] < low + height) & (ends_ref[0, 0, 2 * block + 1] >= low))
        def _add() -> None:
            kind = common_dtype(values_ref.dtype, x_ref.dtype)
            rows = lax.dot_general(
                values_ref[0].astype(kind),
                x_ref[0].astype(kind),
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            for part in range(parts):
                rows_ref[:, part, :] = rows[:, part * _LANES : (part + 1) * _LANES] * scale_ref[0, 0, 0]

            def add(j: jax.Array, _: None) -> None:
                row = index_ref[0, 0, j] - low
                # Rows of another tile are added to a spare row after the tile: cheaper than a branch.
                total_ref[jnp.where((row >= 0) & (row < height), row, height)] += rows_ref[j]

            lax.fori_loop(0, depth, add, None, unroll=8)

        @pallas.when((group == grid[2] - 1) & (chunk == grid[3] - 1) & (block == grid[4] - 1))
        def _store() -> None:
            def store(i: jax.Array, _: None) -> None:
                features = pallas.ds(pallas.multiple_of(i * _LANES, _LANES), _LANES)
                for part in range(parts):
                    lanes = slice(part * _LANES, (part + 1) * _LANES)
                    rows = total_ref[features, part, :]
                    if feature_axis == 1:
                        dw_ref[lanes, features] = rows.T.astype(dw_ref.dtype)
                    else:
                        dw_ref[features, lanes] = rows.astype(dw_ref.dtype)

            lax.fori_loop(0, height // _LANES, store, None)

    shape, block_shape, place = (grid[0] * height, x.shape[2]), (height, width), lambda t, c, *_: (t, c)
    if feature_axis == 1:
        shape, block_shape, place = shape[::-1], block_shape[::-1], lambda t, c, *_: (c, t)
    scalars = pallas_tpu.SMEM
    kernel = Kernel(
        body=body,
        name="msbp_grad_weight",
        platform="tpu",
        results=[(shape, dtype)],
        grid=grid,
        params=tpu_params("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
        in_specs=[
            pallas.BlockSpec((1, 1, depth), lambda t, c, g, chunk, block: (g, 0, block), memory_space=scalars),
            pallas.BlockSpec((1, 1, 2 * grid[4]), lambda t, c, g, chunk, block: (g, 0, 0), memory_space=scalars),
            pallas.BlockSpec((1, 1, 1), lambda t, c, g, chunk, block: (g, 0, 0), memory_space=scalars),
            pallas.BlockSpec((1, at_once, depth), lambda t, c, g, chunk, block: (g, chunk, block)),
            pallas.BlockSpec((1, at_once, width), lambda t, c, g, chunk, block: (g, chunk, c)),
        ],
        out_specs=[pallas.BlockSpec(block_shape, place)],
        scratch=[
            pallas_tpu.VMEM((height + 1, parts, _LANES), jnp.float32),
            pallas_tpu.VMEM((depth, parts, _LANES), jnp.float32),
        ],
        operations=2 * groups * r * k * m,
        bytes_moved=grid[0] * (grid[1] * values.nbytes + x.nbytes) + n * m * jnp.dtype(dtype).itemsize,
    )
    dw = kernel(index[:, None], ends, scale[:, None, None], values, x)[0]
    return dw[:m, :n] if feature_axis == 1 else dw[:n, :m]
