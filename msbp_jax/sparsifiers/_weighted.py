"""State that several uses of one layer make together: each gives a total and a weight, the new state is the quotient.

Uses are the time steps of a recurrent layer, the devices of a `shard_map`, the examples of a `vmap`, two calls with one
memory. A use counts by the rows of its gradient that take part: those that are not exactly 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msbp_jax.kernels.residual import takes_part
from msbp_jax.sparsifiers._base import Sparsifier, State, Weighted


def apply_weighted(
    sparsifier: Sparsifier,
    u: Float[Array, "rows n"],
    state: State,
    live: Bool[Array, "rows 1"] | None = None,
    **seen: jax.Array,
) -> Weighted:
    """Apply a sparsifier to one use: by its own `weighted`, or with its new state weighted by the rows that take part.

    Args:
      sparsifier: Which.
      u: `[rows, n]`.
      state: Its state.
      live: Which rows take part; None to see it in `u`.
      **seen: What the sparsifier wants to see besides.
    """
    if sparsifier.weighted is not None:
        return sparsifier.weighted(u, state, **seen)
    p, new = sparsifier.apply(u, state, **seen)
    if not any(averages(leaf) for leaf in jax.tree.leaves(new)):
        return Weighted(p, new, jax.tree.map(_no_weight, new))
    rows = jnp.sum(takes_part(u) if live is None else live, dtype=jnp.float32)
    total = jax.tree.map(lambda leaf: leaf * rows.astype(leaf.dtype) if averages(leaf) else leaf, new)
    weight = jax.tree.map(lambda leaf: rows.reshape((1,) * leaf.ndim) if averages(leaf) else _no_weight(leaf), new)
    return Weighted(p, total, weight)


def settled(state: State, total: State, weight: State) -> State:
    """Return the new state: total over weight, or the old where nothing took part; of other than numbers, the total."""

    def leaf(old: jax.Array, total: jax.Array, weight: jax.Array) -> jax.Array:
        return quotient(old, total, weight) if averages(old) else total

    return jax.tree.map(leaf, state, total, weight)


def quotient(old: jax.Array, total: jax.Array, weight: jax.Array) -> jax.Array:
    """Return `total / weight` in the dtype of `old`, and `old` where the weight is 0."""
    some = weight != 0
    mean = total / jnp.where(some, weight, jnp.ones((), weight.dtype)).astype(total.dtype)
    return jnp.where(some, mean.astype(old.dtype), old)


def averages(leaf: jax.Array) -> bool:
    """Whether new values of a leaf are averaged over uses: it holds numbers with a fraction."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _no_weight(leaf: jax.Array) -> jax.Array:
    return jnp.zeros((1,) * leaf.ndim, jnp.float32)
