"""`grad_weight` on a GPU, in two kernels, without atomic additions: the same bits on every run.

1. `valuesᵀ x` of every group, a tile a program.
2. Every row of dw is the sum of the rows of these products that belong to it, found in a list sorted by column. A row
   that nobody kept is written as zeros, the large array once, the way the weight is stored.

The products of all groups would be larger than dw: they are made and added up for a few columns of x at a time, few
enough that they stay in the second-level cache. Sums are float32, within a group and over groups; between the two
kernels a group's sum has the dtype of the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from msbp_jax import _compat
from msbp_jax._compat._pallas import pallas
from msbp_jax.formats import Columns, group_rows
from msbp_jax.kernels.columns.grad_weight import _pallas
from msbp_jax.kernels.pallas.kernel import Kernel, triton_params
from msbp_jax.kernels.pallas.products import common_dtype
from msbp_jax.kernels.pallas.tiles import padded, power_of_two, tile_of

_KEPT, _COLUMNS, _ROWS = 128, 128, 32  # of a product's tile, and rows that are multiplied at once
_FEATURES = 32  # of dw that are added up at once
_PRODUCTS_BYTES = 32 * 2**20


def grad_weight(
    cotangent: Columns,
    inputs: Float[Array, "rows m"],
    feature_axis: int,
    precision: Any = None,
    dtype: Any = None,
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    return _pallas.grad_weight("gpu", _product, cotangent, inputs, feature_axis, precision, dtype)


class _Terms(NamedTuple):
    """Which rows of the products add up to each row of dw: `order[first[f] : first[f] + lengths[f]]`."""

    order: Int[Array, " kept"]
    first: Int[Array, " n"]
    lengths: Int[Array, " n"]


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
    kept, columns = power_of_two(k, _KEPT), power_of_two(m, _COLUMNS)
    rows = power_of_two(r, _ROWS)
    values = padded(values, 1, rows, kept)
    chunks = -(-groups * values.shape[2] * m * jnp.dtype(dtype).itemsize // _PRODUCTS_BYTES)
    width = tile_of(m, -(-m // chunks), columns)
    x = padded(group_rows(x, r), 1, rows, width)
    terms = _terms(index, n, values.shape[2])
    shape = -(-n // _FEATURES) * _FEATURES, x.shape[2]
    empty = lax.empty(shape[::-1] if feature_axis == 1 else shape, dtype)
    dw = _compat.varying_alike([empty, x])[0][0]

    def chunk(i: Any, dw: jax.Array) -> jax.Array:
        at = jnp.full((1,), i * width, jnp.int32)
        products = _products(values, scale, x, at, (kept, columns, rows), width, precision, dtype)
        return _sums(products.reshape(-1, width), terms, dw, at, columns, feature_axis)

    dw = chunk(0, dw) if x.shape[2] == width else lax.fori_loop(0, x.shape[2] // width, chunk, dw)
    return dw[:m, :n] if feature_axis == 1 else dw[:n, :m]


def _terms(index: Int[Array, "G k"], n: int, k_padded: int) -> _Terms:
    k = index.shape[1]
    columns = index.reshape(-1)
    order = jnp.argsort(columns, stable=True).astype(jnp.int32)
    count = jnp.zeros(-(-n // _FEATURES) * _FEATURES, jnp.int32).at[columns].add(1, mode="promise_in_bounds")
    return _Terms(order // k * k_padded + order % k, jnp.cumsum(count) - count, count)


def _products(
    values: Num[Array, "G r k"],
    scale: Float[Array, " G"],
    x: Float[Array, "G r m"],
    at: Int[Array, " 1"],
    tile: tuple[int, int, int],
    width: int,
    precision: Any,
    dtype: Any,
) -> Float[Array, "G k width"]:
    """Return `valuesᵀ x` of each group, for `width` columns of x from `at` on."""
    groups, r, k = values.shape
    kept, columns, rows = tile
    kind = common_dtype(values.dtype, x.dtype)

    def body(at_ref: Any, scale_ref: Any, values_ref: Any, x_ref: Any, products_ref: Any) -> None:
        group, i, j = (pallas.program_id(axis) for axis in range(3))
        features = pallas.ds(i * kept, kept)
        from_x = pallas.ds(pallas.multiple_of(at_ref[0], columns) + j * columns, columns)

        def add(block: jax.Array, total: jax.Array) -> jax.Array:
            some = pallas.ds(block * rows, rows)
            return total + jnp.dot(
                values_ref[group, some, features].astype(kind).T,
                x_ref[group, some, from_x].astype(kind),
                precision=precision,
                preferred_element_type=jnp.float32,
            )

        total = lax.fori_loop(0, r // rows, add, jnp.zeros((kept, columns), jnp.float32))
        to = pallas.ds(j * columns, columns)
        products_ref[group, features, to] = (total * scale_ref[group]).astype(products_ref.dtype)

    kernel = Kernel(
        body=body,
        name="msbp_kept_products",
        platform="gpu",
        results=[((groups, k, width), dtype)],
        grid=(groups, k // kept, width // columns),
        params=triton_params(warps=8, stages=3),
        operations=2 * groups * r * k * width,
    )
    return kernel(at, scale, values, x)[0]


def _sums(
    products: Float[Array, "kept width"],
    terms: _Terms,
    dw: Float[Array, ...],
    at: Int[Array, " 1"],
    columns: int,
    feature_axis: int,
) -> Float[Array, ...]:
    """Write the sums of products into `dw`, from the column (or row) `at` on."""
    last = terms.order.shape[0] - 1
    n = terms.lengths.shape[0]

    def body(*refs: Any) -> None:
        products_ref, order_ref, first_ref, count_ref, at_ref, _, dw_ref = refs
        i, j = pallas.program_id(0), pallas.program_id(1)
        features = pallas.ds(i * _FEATURES, _FEATURES)
        first, count = first_ref[features], count_ref[features]
        across = pallas.ds(j * columns, columns)

        def add(term: jax.Array, total: jax.Array) -> jax.Array:
            rows = order_ref[jnp.minimum(first + term, last)]
            terms = products_ref[rows, across].astype(jnp.float32)
            return total + jnp.where((term < count)[:, None], terms, jnp.float32(0))

        zeros = jnp.zeros((_FEATURES, columns), jnp.float32)
        total = lax.fori_loop(0, jnp.max(count), add, zeros).astype(dw_ref.dtype)
        to = pallas.ds(pallas.multiple_of(at_ref[0], columns) + j * columns, columns)
        if feature_axis == 1:
            dw_ref[to, features] = total.T
        else:
            dw_ref[features, to] = total

    kernel = Kernel(
        body=body,
        name="msbp_sums_of_products",
        platform="gpu",
        results=[(dw.shape, dw.dtype)],
        grid=(n // _FEATURES, products.shape[1] // columns),
        params=triton_params(warps=4, stages=2),
        aliases={5: 0},
        operations=products.size,
        bytes_moved=products.nbytes + n * products.shape[1] * dw.dtype.itemsize,
    )
    return kernel(products, *terms, at, dw)[0]
