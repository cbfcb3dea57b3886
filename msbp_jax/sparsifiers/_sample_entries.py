"""Entries drawn by their size, so many of them: unbiased, and of the smallest variance."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msbp_jax import _checks
from msbp_jax.sparsifiers._base import Sparsifier
from msbp_jax.sparsifiers._entries import Pruning, threshold_for
from msbp_jax.sparsifiers._keys import StartingKey


def sample_entries(density: float, *, key: jax.Array | None = None) -> Sparsifier:
    r"""Keep entries with a probability that grows with their size, and weigh them up: unbiased.

        S(g)_ij = g_ij / p_ij   with probability p_ij = min(1, |g_ij| / τ),   else 0,     E[S(g)] = g,

    so that an entry below τ becomes 0 or ±τ, and a larger one stays as it is. τ is such that the probabilities add up
    to the number of entries asked for; for that number no other probabilities have a smaller variance.

    Args:
      density: Share of the entries kept, on the average, of rows that are not exactly 0; in (0, 1].
      key: As in `dithered`.

    Returns:
      The sparsifier. Its state has the key, and the running mean of the density for `msbp.metrics`. Finding τ takes a
      few passes over g. What is not finite is kept. Everything else as in `dithered`.

    Raises:
      ValueError: `density` is out of range.
      TypeError: A value of the wrong type.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.sample_entries(0.05)
      sample_entries(density=0.05)

    References:
      Konečný and Richtárik, Randomized distributed mean estimation, 2016 (arXiv 1611.07555), and Wangni et al., 2017
      (arXiv 1710.09854), for gradients that are sent; here for those that are propagated.
    """
    share = _checks.fraction("density", density, zero=False, meaning="share of the entries kept")
    name = f"sample_entries(density={share:g})"
    return _SampleEntries(name, None if key is None else StartingKey.checked(key), None, share).sparsifier()


@dataclasses.dataclass(frozen=True)
class _SampleEntries(Pruning):
    share: float

    @property
    def density(self) -> float:
        return self.share

    def threshold(
        self, sizes: Float[Array, "rows n"], finite: Bool[Array, "rows n"], live: Bool[Array, "rows 1"]
    ) -> Float[Array, ""]:
        del finite
        if self.share == 1:
            return jnp.zeros((), sizes.dtype)
        entries = live.sum(dtype=sizes.dtype) * sizes.shape[1]
        return threshold_for(sizes, jnp.maximum(self.share * entries, 1))
