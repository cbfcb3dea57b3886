"""The reference of `grad_weight`: one batched product over the groups, whose rows are added where they belong.

Where the groups together keep fewer columns than there are, their rows are added up in a block with one slot for each
column that anybody keeps, and the result is gathered from that block: the large array is written once, in its own
order, and whatever reads it (the optimizer) fuses with that. Otherwise the rows are added straight into the result.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from msbp_jax.formats import Columns, accumulation_dtype, group_rows
from msbp_jax.kernels._chunks import groups_at_once


def grad_weight(
    cotangent: Columns, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`."""
    groups, size, k = cotangent.values.shape
    n = cotangent.shape[1]
    grouped = group_rows(inputs, size)
    accumulator = accumulation_dtype(cotangent.values.dtype, inputs.dtype)
    if groups == 1 and feature_axis == 1:
        columns = lax.dot_general(
            grouped[0],
            cotangent.values[0],
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=accumulator,
        )
        return _spread(columns, cotangent.index[0], n)
    if groups * k < n:
        slot, used = _slots(cotangent.index, n)
        block = _add_rows(cotangent.values, grouped, slot[cotangent.index], groups * k, accumulator, precision)
        rows = jnp.where(used[:, None], jnp.take(block, slot, axis=0, mode="clip"), jnp.zeros((), accumulator))
    else:
        rows = _add_rows(cotangent.values, grouped, cotangent.index, n, accumulator, precision)
    return rows if feature_axis == 0 else rows.T


def _spread(columns: Float[Array, "m k"], index: Int[Array, " k"], n: int) -> Float[Array, "m n"]:
    """Put column `j` at `index[j]` and zeros elsewhere, written as a gather: a scatter along the minor axis is slow."""
    slot, used = _slots(index, n)
    return jnp.where(used, jnp.take(columns, slot, axis=1, mode="clip"), jnp.zeros((), columns.dtype))


def _slots(index: Int[Array, ...], n: int) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """Number the columns that are kept: (slot of each column, whether it is kept by any group)."""
    flat = index.reshape(-1)
    if index.ndim == 1:  # distinct: the place in `index` is the slot
        places = jnp.arange(flat.shape[0], dtype=jnp.int32)
        slot = jnp.zeros((n,), jnp.int32).at[flat].set(places, unique_indices=True)
        return slot, jnp.zeros((n,), bool).at[flat].set(True, unique_indices=True)
    used = jnp.zeros((n,), bool).at[flat].set(True)
    return jnp.cumsum(used.astype(jnp.int32)) - 1, used


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
        rows = lax.dot_general(
            chunk_values,
            chunk_inputs,
            (((1,), (1,)), ((0,), (0,))),
            precision=precision,
            preferred_element_type=dtype,
        )
        return total.at[chunk_place.reshape(-1)].add(rows.reshape(-1, m)), None

    total = jnp.zeros((height, m), dtype)
    if at_once == groups:
        return add(total, (values, inputs, place))[0]
    whole = groups // at_once * at_once
    values_, inputs_, place_ = (a[:whole].reshape(-1, at_once, *a.shape[1:]) for a in (values, inputs, place))
    total, _ = lax.scan(add, total, (values_, inputs_, place_))
    if whole < groups:
        total, _ = add(total, (values[whole:], inputs[whole:], place[whole:]))
    return total
