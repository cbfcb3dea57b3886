"""The reference of `grad_input`: gather the kept columns of the weight, then one batched product over the groups.

A weight stored `[m, n]` is gathered along its minor axis and the small block is turned round: transposing the whole
weight so as to gather rows costs several times more on a CPU.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax.formats import Columns, accumulation_dtype
from msbp_jax.kernels import _platform
from msbp_jax.kernels._chunks import groups_at_once
from msbp_jax.kernels._layout import transposed


def grad_input(
    cotangent: Columns, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    cotangent = cotangent.dequantized(weight.dtype)
    groups, size, k = cotangent.values.shape
    m = weight.shape[1 - feature_axis]
    result = result_dtype(accumulation_dtype(cotangent.values.dtype, weight.dtype), dtype)
    at_once = groups_at_once(groups, k * m * weight.dtype.itemsize)
    if at_once == groups:
        blocks = _product(cotangent.values, _gathered(weight, cotangent.index, feature_axis), precision, result)
    else:
        blocks = lax.map(
            lambda group: _product(group[0][None], _gathered(weight, group[1][None], feature_axis), precision, result)[
                0
            ],
            (cotangent.values, cotangent.index),
            batch_size=at_once,
        )
    return blocks.reshape(groups * size, m)[: cotangent.shape[0]].astype(dtype or blocks.dtype)


def _gathered(weight: Float[Array, ...], index: Int[Array, "G k"], feature_axis: int) -> Float[Array, "G k m"]:
    flat = index.reshape(-1)
    if feature_axis == 0:
        rows = jnp.take(weight, flat, axis=0, mode="clip")
    else:
        rows = transposed(jnp.take(weight, flat, axis=1, mode="clip"))
    return rows.reshape(*index.shape, -1)


def result_dtype(accumulator: Any, wanted: Any) -> Any:
    """Return the dtype of a product: that of its sums on a CPU; an accelerator rounds them as it writes them."""
    return accumulator if wanted is None or _platform.platform() == "cpu" else wanted


def _product(
    values: Float[Array, "G r k"], rows: Float[Array, "G k m"], precision: Any, dtype: Any
) -> Float[Array, "G r m"]:
    over_groups = (((2,), (1,)), ((0,), (0,)))
    return lax.dot_general(values, rows, over_groups, precision=precision, preferred_element_type=dtype)
