"""`grad_input` on a GPU: one program for each group and tile of dx, whose rows of wᵀ go straight into the product.

The gathered block, which XLA writes to memory and reads again, never exists. A weight stored `[m, n]` is transposed
first, in one pass, so that the rows which are gathered are contiguous.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from msbp_jax._compat._pallas import pallas
from msbp_jax.formats import Columns
from msbp_jax.kernels.choice import roofline, target
from msbp_jax.kernels.columns.grad_input import _pallas
from msbp_jax.kernels.pallas.kernel import Kernel, triton_params
from msbp_jax.kernels.pallas.products import common_dtype
from msbp_jax.kernels.pallas.tiles import padded, power_of_two

_ROWS, _COLUMNS = 128, 128  # of a tile of dx
_DEPTH_BYTES = 128  # of a row of values that are multiplied at once


def grad_input(
    cotangent: Columns, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    return _pallas.grad_input("gpu", _product, cotangent, weight, feature_axis, precision, dtype)


def _product(
    values: Num[Array, "G r k"],
    index: Int[Array, "G k"],
    scale: Float[Array, " G"],
    w: Float[Array, "n m"],
    precision: Any,
    dtype: Any,
) -> Float[Array, "G r m"]:
    groups, r, k = values.shape
    m = w.shape[1]
    kind = common_dtype(values.dtype, w.dtype)
    height, width = power_of_two(r, _ROWS), power_of_two(m, _COLUMNS)
    depth = power_of_two(k, _DEPTH_BYTES // kind.itemsize)
    # Padded values are 0, and padded indices repeat the group's last one, so that no other row is read.
    values, w = padded(values, 1, height, depth), padded(w, 1, width)
    index = padded(index, 1, depth, mode="edge")
    grid = groups, w.shape[1] // width, values.shape[1] // height

    def body(values_ref: Any, index_ref: Any, scale_ref: Any, w_ref: Any, dx_ref: Any) -> None:
        group, column, row = (pallas.program_id(axis) for axis in range(3))
        rows, columns = pallas.ds(row * height, height), pallas.ds(column * width, width)

        def add(block: jax.Array, total: jax.Array) -> jax.Array:
            kept = pallas.ds(block * depth, depth)
            return total + jnp.dot(
                values_ref[group, rows, kept].astype(kind),
                w_ref[index_ref[group, kept], columns].astype(kind),
                precision=precision,
                preferred_element_type=jnp.float32,
            )

        total = lax.fori_loop(0, values.shape[2] // depth, add, jnp.zeros((height, width), jnp.float32))
        dx_ref[group, rows, columns] = (total * scale_ref[group]).astype(dx_ref.dtype)

    kernel = Kernel(
        body=body,
        name="msbp_grad_input",
        platform="gpu",
        results=[((groups, values.shape[1], w.shape[1]), dtype)],
        grid=grid,
        # Two stages take 64 KiB of shared memory, which every chip has; the larger ones have room for three.
        params=triton_params(warps=8, stages=3 if roofline.known(target.device()) else 2),
        operations=2 * groups * r * k * m,
    )
    return kernel(values, index, scale, w)[0][:, :r, :m]
