r"""Unbiased draws: which of a number of things are kept, by their scores.

A thing of score s is kept with probability `p = min(1, s~ / t)` and then counts `1 / p`, so that its expectation is
itself. What such a draw is worth, against keeping everything, is its *relative efficiency*

    e = sum s^2 / sum (s^2 / p) :

the variance that it adds is as if the batch were e times as large. `s~` is the score with a floor, which bounds the
weights: scores are of this step's gradient alone, and one that is nearly 0 by chance must not count a thousandfold.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

FLOOR = 0.1  # share of the mean score that every score is raised by
_ITERATIONS = 24  # Newton's method on a convex function of straight pieces; five to ten are usual
_BITS = 32


class Draw(NamedTuple):
    """What was drawn.

    Attributes:
      weight: `1 / p` of what is kept, 0 of the rest, float32.
      efficiency: `e` of these probabilities, `[]`.
    """

    weight: Float[Array, " things"]
    efficiency: Float[Array, ""]


def draw(
    key: jax.Array,
    scores: Float[Array, " things"],
    live: Bool[Array, " things"],
    *,
    efficiency: float | None = None,
    count: int | jax.Array | None = None,
) -> Draw:
    """Draw things, systematically in a random order: each is kept with exactly its probability.

    Args:
      key: PRNG key.
      scores: Of each thing, float32, not negative; one that is not finite is kept.
      live: Which things there are; the others are left out, and not counted in anything.
      efficiency: Keep as few as are worth this, by their expected number; or
      count: keep so many, or all there are.
    """
    certain = live & ~jnp.isfinite(scores)
    chosen_among = live & ~certain
    scores = jnp.where(chosen_among, scores, 0)
    scores = scores / jnp.maximum(scores.max(initial=0), jnp.finfo(jnp.float32).tiny)
    floored = jnp.where(chosen_among, (1 - FLOOR) * scores + FLOOR * _mean(scores, chosen_among), 0)
    if efficiency is not None:
        p = for_efficiency(scores, floored, efficiency)
    else:
        assert count is not None
        p = for_count(floored, jnp.maximum(count - certain.sum(), 0))
    alike = ~jnp.any(floored > 0)  # no score tells anything: keep all
    p = jnp.where(certain | (chosen_among & alike), 1, p)
    kept, p = systematic(key, p, whole=count is not None)
    squares = jnp.square(scores)
    worth = jnp.sum(squares) / jnp.sum(jnp.where(p > 0, squares / jnp.where(p > 0, p, 1), 0))
    return Draw(jnp.where(kept, 1 / jnp.where(p > 0, p, 1), 0), jnp.where(alike, 1, worth))


def for_efficiency(
    scores: Float[Array, " things"], floored: Float[Array, " things"], efficiency: float
) -> Float[Array, " things"]:
    """Return the smallest `p = min(1, s~ / t)` with `sum s^2 / sum (s^2 / p) >= efficiency`.

    `sum s^2 max(1, t / s~)` is convex in t and made of straight pieces: Newton's method, begun above the root, comes
    down to it in finitely many steps.
    """
    if efficiency == 1:
        return (floored > 0).astype(scores.dtype)
    squares = jnp.square(scores)
    ratios = jnp.where(floored > 0, squares / jnp.where(floored > 0, floored, 1), 0)
    target = squares.sum() / efficiency

    def closer(_: jax.Array, t: jax.Array) -> jax.Array:
        kept = floored >= t
        slope = jnp.where(kept, 0, ratios).sum()
        return jnp.where(slope > 0, (target - jnp.where(kept, squares, 0).sum()) / jnp.where(slope > 0, slope, 1), t)

    start = target / jnp.maximum(ratios.sum(), jnp.finfo(jnp.float32).tiny)
    t = lax.fori_loop(0, _ITERATIONS, closer, start) * (1 - 3e-6)  # rounding must not end below what is asked for
    p = jnp.minimum(1, floored / jnp.where(t > 0, t, 1))
    return jnp.where(t > 0, p, (floored > 0).astype(p.dtype))


def for_count(floored: Float[Array, " things"], count: int | jax.Array) -> Float[Array, " things"]:
    """Return `p = min(1, c s~)` of the sum `count`, or 1 for all that have a score if these are no more.

    The sum is concave in c and made of straight pieces: Newton's method, begun below the root, comes up to it.
    """
    some = floored > 0
    wanted = jnp.asarray(count, floored.dtype)

    def closer(_: jax.Array, c: jax.Array) -> jax.Array:
        kept = c * floored >= 1
        rest = jnp.where(kept, 0, floored).sum()
        return jnp.where(rest > 0, (wanted - kept.sum(dtype=floored.dtype)) / jnp.where(rest > 0, rest, 1), c)

    start = wanted / jnp.maximum(floored.sum(), jnp.finfo(jnp.float32).tiny)
    p = jnp.clip(lax.fori_loop(0, _ITERATIONS, closer, start) * floored, 0, 1)
    return jnp.where(some.sum(dtype=floored.dtype) <= wanted, some.astype(floored.dtype), p)


def systematic(
    key: jax.Array, p: Float[Array, " things"], *, whole: bool
) -> tuple[Bool[Array, " things"], Float[Array, " things"]]:
    """Return what is drawn with probabilities p, and these: the points u + j that fall on the things laid end to end.

    So the number is the sum of p, rounded down or up. Lengths are whole multiples of 2^-32, and sums of them that wrap
    around keep nothing but the fraction, which is all that matters: no rounding, however many there are.

    Args:
      key: PRNG key.
      p: In [0, 1]; 1 is always kept, 0 never.
      whole: Whether p adds up to a whole number, but for rounding, and the number drawn is to be that.
    """
    random = jax.random.bits(key, (p.shape[0] + 1,), jnp.uint32)
    open_ = (p > 0) & (p < 1)
    lengths = jnp.where(open_, p * jnp.float32(2.0**_BITS), 0).astype(jnp.uint32)
    if whole:  # what rounding left over goes to the thing that notices least
        spare = jnp.minimum(lengths, jnp.uint32(0) - lengths)
        takes = jnp.arange(p.shape[0]) == jnp.argmax(spare)
        lengths = jnp.where(takes & open_, lengths - lengths.sum(dtype=jnp.uint32), lengths)
        p = jnp.where(takes & open_, lengths.astype(jnp.float32) * jnp.float32(2.0**-_BITS), p)
    order = jnp.argsort(random[1:])
    in_order = lengths[order]
    ends = jnp.cumsum(in_order, dtype=jnp.uint32) + random[0]
    hit = jnp.zeros(p.shape, bool).at[order].set(ends < in_order, mode="promise_in_bounds", unique_indices=True)
    return hit | (p >= 1), p


def _mean(scores: Float[Array, " things"], among: Bool[Array, " things"]) -> Float[Array, ""]:
    return scores.sum() / jnp.maximum(among.sum(), 1).astype(scores.dtype)
