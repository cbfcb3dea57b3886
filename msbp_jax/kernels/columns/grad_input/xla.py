"""The reference of `grad_input`: gather the kept columns of the weight, then one batched product over the groups.

A weight stored `[m, n]` is gathered along its minor axis and the small block is transposed: transposing the whole
weight so as to gather rows costs several times more on a CPU.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax.formats import Columns
from msbp_jax.kernels.xla.chunks import groups_at_once
from msbp_jax.kernels.xla.dot import dot
from msbp_jax.kernels.xla.layout import transposed


def grad_input(
    cotangent: Columns, weight: Float[Array, ...], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, "rows m"]:
    """See `msbp_jax.kernels.grad_input`."""
    cotangent = cotangent.dequantized(weight.dtype)
    groups, size, k = cotangent.values.shape
    m = weight.shape[1 - feature_axis]
    at_once = groups_at_once(groups, k * m * weight.dtype.itemsize)

    def product(values: Float[Array, "chunk r k"], index: Int[Array, "chunk k"]) -> Float[Array, "chunk r m"]:
        rows = _gathered(weight, index, feature_axis)
        return dot(values, rows, (((2,), (1,)), ((0,), (0,))), precision, dtype)

    parts = cotangent.values, cotangent.index
    if at_once == groups:
        blocks = product(*parts)
    else:
        blocks = lax.map(lambda group: product(*(part[None] for part in group))[0], parts, batch_size=at_once)
    return blocks.reshape(groups * size, m)[: cotangent.shape[0]].astype(dtype or blocks.dtype)


def _gathered(weight: Float[Array, ...], index: Int[Array, "G k"], feature_axis: int) -> Float[Array, "G k m"]:
    flat = index.reshape(-1)
    if feature_axis == 0:
        rows = jnp.take(weight, flat, axis=0, mode="clip")
    else:
        rows = transposed(jnp.take(weight, flat, axis=1, mode="clip"))
    return rows.reshape(*index.shape, -1)
