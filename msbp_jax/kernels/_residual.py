"""What a memory adds to a gradient, and what is left for it of what was not propagated."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns, Dense, Format, accumulation_dtype, group_rows


def add_memory(g: Float[Array, "rows n"], memory: Float[Array, ...]) -> Float[Array, "rows n"]:
    """Return `u = g + m` in the dtype that sums are made in; m is `[n]` or `[rows, n]`."""
    dtype = accumulation_dtype(g.dtype)
    remembered = memory.astype(dtype)
    return g.astype(dtype) + (remembered if memory.ndim == 2 else remembered[None, :])


def carried_on(u: Float[Array, "rows n"], p: Format, decay: float, *, by_slot: bool) -> Float[Array, ...]:
    """Return `m' = decay R(u - p)`, float32; entries that are not finite become 0."""
    left = _residual_slots(u, p) if by_slot else _residual_mean(u, p)
    return finite((jnp.asarray(decay, u.dtype) * left).astype(jnp.float32))


def finite(x: Float[Array, ...]) -> Float[Array, ...]:
    """Return the array with 0 for entries that are not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def _residual_mean(u: Float[Array, "rows n"], p: Format) -> Float[Array, " n"]:
    """Return the mean of `u - p` over rows in one pass over `u`, without a dense copy of either."""
    rows = u.shape[0]
    if isinstance(p, Dense):
        return finite(u - p.values).sum(axis=0) / rows
    dropped = ~p.kept_columns()
    grouped = group_rows(u, p.rows_per_group)
    total = jnp.where(dropped[:, None, :], finite(grouped), jnp.zeros((), u.dtype)).sum(axis=(0, 1))
    if not p.unchanged:
        total = total.at[p.index.reshape(-1)].add(_left_of_kept(u, p).sum(axis=1).reshape(-1))
    return total / rows


def _residual_slots(u: Float[Array, "rows n"], p: Format) -> Float[Array, "rows n"]:
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
