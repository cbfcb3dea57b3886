"""`select` in native code: scores, an exact top-k without sorting, and the kept entries, while a group is in cache."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.select import xla
from msbp_jax.kernels.native import calls


def select(cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None) -> Columns:
    """See `msbp_jax.kernels.select`."""
    calls.check(cotangent)
    rows, n = cotangent.shape
    r = min(rows_per_group or rows, rows)
    groups = -(-rows // r)
    calls.check_entries(groups * r * k)
    results = [((groups, r, k), cotangent.dtype), ((groups, k), jnp.int32)]
    split = ("select", rows, r)
    choose = functools.partial(xla.choose_over, k)
    values, index = calls.call(
        "select", [cotangent], results, split=split, choose_together=choose, k=k, rows_per_group=r
    )
    return Columns(values, index, (rows, n))
