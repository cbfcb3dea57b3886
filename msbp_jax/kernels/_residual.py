"""What a memory adds to a gradient, and what is left for it of what was not propagated.

A row of the gradient that is exactly 0 (padding, a masked label) takes no part: nothing is added to it, it has no
score, and nothing is left of it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msbp_jax.formats import Columns, Dense, Format, accumulation_dtype, group_rows


class Remembered(NamedTuple):
    """What is added to a gradient.

    Attributes:
      memory: float32, `[n]` or `[rows, n]`.
      live: Which rows it is added to, `[rows, 1]`.
    """

    memory: Float[Array, ...]
    live: Bool[Array, "rows 1"]


def takes_part(g: Float[Array, "rows n"]) -> Bool[Array, "rows 1"]:
    """Return which rows take part: those with an entry that is not 0, be it too small for XLA to tell it from 0."""
    bits = jax.lax.bitcast_convert_type(g, f"uint{8 * g.dtype.itemsize}")
    return jnp.any(bits << 1 != 0, axis=1, keepdims=True)  # without the sign, as -0 is 0


def add_memory(
    g: Float[Array, "rows n"], memory: Float[Array, ...], live: Bool[Array, "rows 1"]
) -> Float[Array, "rows n"]:
    """Return `u = g + m`, m being `[n]` or `[rows, n]`, in the dtype that sums are made in; 0 where a row is idle."""
    dtype = accumulation_dtype(g.dtype)
    remembered = memory.astype(dtype)
    u = g.astype(dtype) + (remembered if memory.ndim == 2 else remembered[None, :])
    return jnp.where(live, u, jnp.zeros((), dtype))


def left_of(
    u: Float[Array, "rows n"], p: Format, live: Bool[Array, "rows 1"], *, by_slot: bool
) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """Return what is left of u, entries that are not finite as 0, and how much counts in it, both float32.

    Args:
      u: `g + m`.
      p: What is propagated.
      live: Which rows take part.
      by_slot: Whether each row keeps its own: `u - p`, `[rows, n]`, and `live` as numbers, `[rows, 1]`. Otherwise the
        sum over rows, `[n]`, and the number of rows that take part, `[1]`.
    """
    left = _slots(u, p) if by_slot else _sum(u, p, live)
    rows = live.astype(jnp.float32)
    return finite(left.astype(jnp.float32)), rows if by_slot else rows.sum(axis=0)


def finite(x: Float[Array, ...]) -> Float[Array, ...]:
    """Return the array with 0 for entries that are not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def _sum(u: Float[Array, "rows n"], p: Format, live: Bool[Array, "rows 1"]) -> Float[Array, " n"]:
    """Return the sum of `u - p` over rows in one pass over `u`, without a dense copy of either."""
    if isinstance(p, Dense):
        return jnp.where(live, finite(u - p.values), jnp.zeros((), u.dtype)).sum(axis=0)
    dropped = ~p.kept_columns()
    grouped = group_rows(u, p.rows_per_group)
    total = jnp.where(dropped[:, None, :], finite(grouped), jnp.zeros((), u.dtype)).sum(axis=(0, 1))
    if not p.unchanged:
        total = total.at[p.index.reshape(-1)].add(_left_of_kept(u, p).sum(axis=1).reshape(-1))
    return total


def _slots(u: Float[Array, "rows n"], p: Format) -> Float[Array, "rows n"]:
    """Return `u - p`."""
    if isinstance(p, Dense):
        return u - p.values
    dropped = jnp.repeat(~p.kept_columns(), p.rows_per_group, axis=0)[: u.shape[0]]
    left = jnp.where(dropped, u, jnp.zeros((), u.dtype))
    if not p.unchanged:
        rows = jnp.arange(u.shape[0])[:, None]
        index = jnp.repeat(p.index, p.rows_per_group, axis=0)[: u.shape[0]]
        kept = _left_of_kept(u, p).reshape(-1, p.kept_per_group)[: u.shape[0]]
        left = left.at[rows, index].set(kept)
    return left


def _left_of_kept(u: Float[Array, "rows n"], p: Columns) -> Float[Array, "G r k"]:
    """Return `u - p` at the entries that `p` keeps but has altered."""
    before = jnp.take_along_axis(group_rows(u, p.rows_per_group), p.index[:, None, :], axis=2, mode="promise_in_bounds")
    return finite(before - p.dequantized(before.dtype).values)
