"""A number of rows that is known when the program runs, in a program of fixed shapes: the next of a few sizes.

The rows that are kept come first, then as many others, of weight 0, as fill up the next rung. A rung is a branch of a
`switch`, a dense product at XLA's full speed, where a loop over blocks would be many small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax.formats import Rows, weighed

# Shares of the rows. Closer rungs would waste less and take longer to compile: a third at most, a seventh on average.
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
_MULTIPLE = 8  # rows; smaller products are no faster


def climb(
    p: Rows, product: Callable[[Int[Array, " size"], Float[Array, "size n"]], jax.Array], whole: Callable[[], jax.Array]
) -> jax.Array:
    """Return a product on the kept rows, or on all of them where no rung below holds them.

    Args:
      p: The cotangent.
      product: Takes which rows, and them multiplied by their weights.
      whole: The product of the whole matrix.
    """
    rows = p.shape[0]
    sizes = rungs(rows)
    if not sizes:
        return whole()
    order, count = kept_first(p)

    def branch(size: int) -> Callable[[], jax.Array]:
        return lambda: product(order[:size], gathered(p, order[:size]))

    wanted = largest_of_members(count)
    rung = sum((wanted > size).astype(jnp.int32) for size in sizes)  # no array of sizes: it would be a constant
    return lax.switch(rung, [*map(branch, sizes), whole])


def rungs(rows: int) -> list[int]:
    """Return the numbers of rows that have a branch of their own, ascending; all rows have another."""
    sizes = {-(-round(share * rows) // _MULTIPLE) * _MULTIPLE for share in SHARES}
    return sorted(size for size in sizes if 0 < size < rows)


def kept_first(p: Rows) -> tuple[Int[Array, " rows"], Int[Array, ""]]:
    """Return all rows, those that are kept first, both parts ascending; and how many are kept."""
    kept = p.kept_rows()
    before = jnp.cumsum(kept, dtype=jnp.int32)
    count = before[-1]
    numbers = jnp.arange(kept.shape[0], dtype=jnp.int32)
    place = jnp.where(kept, before - 1, count + numbers - before)
    return jnp.zeros_like(numbers).at[place].set(numbers, mode="promise_in_bounds", unique_indices=True), count


def gathered(p: Rows, at: Int[Array, " size"]) -> Float[Array, "size n"]:
    """Return some rows, multiplied by their weights."""
    rows = jnp.take(p.values, at, axis=0, mode="clip")
    return rows if p.unchanged else weighed(rows, jnp.take(p.weight, at, mode="clip"))


def largest_of_members(number: jax.Array) -> jax.Array:
    """Return a number; under `vmap` the largest of all members, the same for all.

    A `cond` or a `switch` on it stays one: on a number of each member's own it would run every branch.
    """

    @jax.custom_batching.custom_vmap
    def shared(number: jax.Array) -> jax.Array:
        return number

    @shared.def_vmap
    def _over_members(size: int, batched: Sequence[bool], number: jax.Array) -> tuple[Any, bool]:
        del size
        return shared(number.max(axis=0) if batched[0] else number), False

    return shared(number)
