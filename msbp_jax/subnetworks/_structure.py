"""Probabilities of units: samples of masks, the gradient of a loss by them, and the projection onto a budget."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

type Probabilities = dict[str, Float[Array, " units"]]  # by group
type Masks = dict[str, Bool[Array, " units"]]


class Structure(struct.PyTreeNode):
    """What is learned of the structure, and its optimizer's state; save it as the parameters are.

    Attributes:
      probabilities: By group `[units]`, float32: the chance of each unit to be in a sample.
      opt_state: Of the structure's optimizer.
      step: How many updates there were.
    """

    probabilities: Probabilities
    opt_state: Any
    step: Int[Array, ""]


def draw(probabilities: Probabilities, key: jax.Array) -> Masks:
    """Return a mask for each group, whose units are drawn each by itself."""
    keys = jax.random.split(key, len(probabilities))
    return {
        name: jax.random.uniform(k, s.shape) < s
        for k, (name, s) in zip(keys, sorted(probabilities.items()), strict=True)
    }


def gradient(
    probabilities: Probabilities, first: Masks, second: Masks, difference: Float[Array, ""], alpha: float
) -> Probabilities:
    """Return the estimate of `(s (1 - s))^alpha dE[L]/ds` from the losses of two samples.

        ½ (L - L') (m - m') / (s (1 - s))^(1 - alpha)

    Unbiased, as `E[m - s] = 0` and `L'` does not depend on `m`. A unit that is never or always drawn has m = m', and
    the gradient 0.

    Args:
      probabilities: s, by group.
      first: m.
      second: m'.
      difference: L - L'.
      alpha: Exponent of the preconditioner.
    """

    def of(s: jax.Array, m: jax.Array, other: jax.Array) -> jax.Array:
        spread = s * (1 - s)
        certain = spread <= 0
        scale = jnp.where(certain, 1, spread) ** (alpha - 1)
        differs = m.astype(s.dtype) - other.astype(s.dtype)
        return jnp.where(certain & (differs == 0), 0 * difference, 0.5 * difference * differs * scale)

    return {name: of(s, first[name], second[name]) for name, s in probabilities.items()}


def projected(probabilities: Probabilities, budget: float | Float[Array, ""]) -> Probabilities:
    """Return the nearest probabilities in `{sum s <= budget, 0 <= s <= 1}`, one threshold for all groups.

        clip(s - v, 0, 1),   v = max(0, the root of sum clip(s - v, 0, 1) = budget)

    Exactly: between neighbours of the values s and s - 1, in order, the sum is linear in v.

    Args:
      probabilities: s, by group, of any size.
      budget: How many units there may be on the average.
    """
    s = jnp.concatenate([probabilities[name] for name in sorted(probabilities)])
    budget = jnp.asarray(budget, s.dtype)
    v = jnp.where(jnp.clip(s, 0, 1).sum() > budget, _threshold(_bounded(s, budget), budget), 0)
    return {name: jnp.clip(value - v, 0, 1) for name, value in probabilities.items()}


def _bounded(s: Float[Array, " units"], budget: Float[Array, ""]) -> Float[Array, " units"]:
    """Return values that have the same threshold, none of them so large that others are rounded away beside it.

    The threshold is at least 0; and at most the value behind the `budget` largest, above which by 1 a unit is certain.
    """
    behind = jnp.maximum(s.size - 1 - jnp.floor(budget).astype(jnp.int32), 0)
    return jnp.clip(s, 0, jnp.maximum(jnp.sort(s)[behind], 0) + 1)


def _threshold(s: Float[Array, " units"], budget: Float[Array, ""]) -> Float[Array, ""]:
    breaks = jnp.sort(jnp.concatenate([s, s - 1]))
    ascending = jnp.sort(s)
    after = jnp.concatenate([jnp.cumsum(ascending[::-1])[::-1], jnp.zeros(1, s.dtype)])

    def above(v: jax.Array) -> jax.Array:
        """Return sum max(s - v, 0)."""
        at = jnp.searchsorted(ascending, v, side="right")
        return after[at] - (s.size - at).astype(s.dtype) * v

    sums = above(breaks) - above(breaks + 1)
    # The sum falls with v: the last break at which it is still above the budget starts the piece with the root.
    piece = jnp.maximum(jnp.sum(sums > budget) - 1, 0)
    middle = (breaks[piece] + breaks[jnp.minimum(piece + 1, breaks.size - 1)]) / 2
    full = jnp.sum(s - middle >= 1).astype(s.dtype)
    inside = (s > middle) & (s - middle < 1)
    # From the members of the piece themselves, which rounds once, not once a term of a running sum.
    return (jnp.where(inside, s, 0).sum() - (budget - full)) / jnp.maximum(inside.sum(), 1).astype(s.dtype)
