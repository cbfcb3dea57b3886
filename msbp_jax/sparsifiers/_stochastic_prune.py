"""Stochastic pruning: entries below a threshold become 0 or as large as the threshold."""

from __future__ import annotations

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msbp_jax import _checks
from msbp_jax.sparsifiers._base import Sparsifier
from msbp_jax.sparsifiers._entries import Pruning
from msbp_jax.sparsifiers._keys import StartingKey


def stochastic_prune(rate: float, *, key: jax.Array | None = None) -> Sparsifier:
    r"""Make entries below a threshold 0 or as large as it, by chance: unbiased.

        S(g) = g if |g| >= τ,   else sign(g) τ with probability |g| / τ,   else 0,     E[S(g)] = g,
        τ = Φ⁻¹((1 + rate)/2) sqrt(π/2) mean |g|,

    which is the threshold below which a share `rate` of the entries lies, if they are normal. `sample_entries` draws
    alike and finds the τ of a number of entries, whatever their distribution.

    Args:
      rate: Share of the entries that are below the threshold, in (0, 1).
      key: As in `dithered`.

    Returns:
      The sparsifier. Its state has the key, and the running mean of the density for `msbp.metrics`. The mean is that of
      the finite entries of rows that are not exactly 0. Everything else as in `dithered`.

    Raises:
      ValueError: `rate` is out of range.
      TypeError: A value of the wrong type.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.stochastic_prune(0.9)
      stochastic_prune(rate=0.9)

    References:
      Ye et al., Accelerating CNN Training by Pruning Activation Gradients, 2019 (arXiv 1908.00173).
    """
    meaning = "share of the entries below the threshold"
    share = _checks.number("rate", rate, meaning)
    if not 0 < share < 1 or (1 + share) / 2 == 1:
        raise ValueError(f"rate must lie in (0, 1) ({meaning}), got {rate}. msbp.dense() prunes nothing.")
    name = f"stochastic_prune(rate={share:g})"
    return _StochasticPrune(name, None if key is None else StartingKey.checked(key), None, share).sparsifier()


@dataclasses.dataclass(frozen=True)
class _StochasticPrune(Pruning):
    rate: float

    def threshold(
        self, sizes: Float[Array, "rows n"], finite: Bool[Array, "rows n"], live: Bool[Array, "rows 1"]
    ) -> Float[Array, ""]:
        counted = jnp.sum(finite & live, axis=0, dtype=sizes.dtype).sum()
        mean = sizes.sum(axis=0).sum() / jnp.maximum(counted, 1)
        return statistics.NormalDist().inv_cdf((1 + self.rate) / 2) * math.sqrt(math.pi / 2) * mean
