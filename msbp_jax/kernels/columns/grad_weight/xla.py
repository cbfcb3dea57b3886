"""The reference of `grad_weight`: one batched product over the groups, whose rows are added where they belong.

Where the groups together keep fewer columns than there are, of a large weight, the rows are added up in a block with
one slot for each column that anybody keeps, and the result is gathered from that block along the axis in which it is
stored: the large array is written once. Otherwise they are added up in a block as large as the result, which is
transposed once.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax import _compat
from msbp_jax.formats import Columns, Size, accumulation_dtype, group_rows
from msbp_jax.kernels.xla.chunks import groups_at_once
from msbp_jax.kernels.xla.dot import dot
from msbp_jax.kernels.xla.layout import row_major, transposed

_SPREAD_FROM_BYTES = 8 * 2**20


def grad_weight(
    cotangent: Columns, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    cotangent = cotangent.dequantized(inputs.dtype)
    groups, size, k = cotangent.values.shape
    n = cotangent.shape[1]
    grouped = group_rows(inputs, size)
    accumulator = accumulation_dtype(cotangent.values.dtype, inputs.dtype)
    if groups != 1 and not _pays_to_spread(groups * k, n, inputs.shape[1] * n * jnp.dtype(accumulator).itemsize):
        rows = _add_rows(cotangent.values, grouped, cotangent.index, n, accumulator, precision)
        return (rows if feature_axis == 0 else transposed(rows)).astype(dtype or accumulator)
    slot = _slots(cotangent.index, n)
    if groups == 1 and feature_axis == 1:
        over_rows = (((0,), (0,)), ((), ()))
        kept = dot(grouped[0], cotangent.values[0], over_rows, precision, dtype)
    else:
        kept = _add_rows(cotangent.values, grouped, slot[cotangent.index], groups * k, accumulator, precision)
        kept = kept if feature_axis == 0 else transposed(kept)
    spread = jnp.take(kept, slot, axis=feature_axis, mode="clip")
    used = jnp.expand_dims(slot >= 0, 1 - feature_axis)
    return row_major(jnp.where(used, spread, jnp.zeros((), spread.dtype))).astype(dtype or accumulator)


def _pays_to_spread(kept: Size, n: int, result_bytes: int) -> bool:
    """Whether to add up in a smaller block: it spares a pass over a result too large for the cache, and costs ops."""
    return not _compat.is_symbolic(kept) and kept < n and result_bytes > _SPREAD_FROM_BYTES


def _slots(index: Int[Array, "G k"], n: int) -> Int[Array, " n"]:
    """Number the columns that some group keeps, from 0; the others are -1."""
    if index.shape[0] == 1:  # its columns are distinct, so their places number them
        places = jnp.arange(index.shape[1], dtype=jnp.int32)
        return jnp.full((n,), -1, jnp.int32).at[index[0]].set(places, unique_indices=True, mode="promise_in_bounds")
    used = jnp.zeros((n,), bool).at[index.reshape(-1)].set(True, mode="promise_in_bounds")
    return jnp.where(used, jnp.cumsum(used, dtype=jnp.int32) - 1, -1)


def _add_rows(
    values: Float[Array, "G r k"],
    inputs: Float[Array, "G r m"],
    place: Int[Array, "G k"],
    height: int,
    dtype: jnp.dtype,
    precision: Any,
) -> Float[Array, "height m"]:
    """Add row `j` of `valuesᵀ inputs` of each group at `place[j]`, over chunks of groups that fit the budget."""
    groups, _, k = values.shape
    m = inputs.shape[-1]
    at_once = groups_at_once(groups, k * m * jnp.dtype(dtype).itemsize)

    def add(
        total: Float[Array, "height m"], chunk: tuple[Array, Array, Array]
    ) -> tuple[Float[Array, "height m"], None]:
        chunk_values, chunk_inputs, chunk_place = chunk
        rows = dot(chunk_values, chunk_inputs, (((1,), (1,)), ((0,), (0,))), precision, dtype)
        return total.at[chunk_place.reshape(-1)].add(rows.reshape(-1, m), mode="promise_in_bounds"), None

    total = jnp.zeros((height, m), dtype)
    if at_once == groups:
        return add(total, (values, inputs, place))[0]
    whole = groups // at_once * at_once
    values_, inputs_, place_ = (a[:whole].reshape(-1, at_once, *a.shape[1:]) for a in (values, inputs, place))
    total, _ = lax.scan(add, total, (values_, inputs_, place_))
    if whole < groups:
        total, _ = add(total, (values[whole:], inputs[whole:], place[whole:]))
    return total
