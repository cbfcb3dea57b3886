"""Entries drawn by their size, so many of them: unbiased, and of the smallest variance."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from msbp_jax import _checks
from msbp_jax.formats import Entries, accumulation_dtype, finite
from msbp_jax.kernels import dither
from msbp_jax.kernels.residual import takes_part
from msbp_jax.sparsifiers._base import Sparsifier
from msbp_jax.sparsifiers._entries import (
    EntriesState,
    share_of,
    split_words,
    starting_state,
    threshold_for,
    told,
)
from msbp_jax.sparsifiers._keys import StartingKey
from msbp_jax.sparsifiers._where import Where


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
    return _SampleEntries(share, None if key is None else StartingKey.checked(key), None).sparsifier()


@dataclasses.dataclass(frozen=True)
class _SampleEntries:
    density: float
    key: StartingKey | None
    backend: str | None

    def sparsifier(self) -> Sparsifier:
        name = f"sample_entries(density={self.density:g})"
        return Sparsifier(init=self.init, apply=self.apply, name=name, at=self.at, remembers=False)

    def at(self, where: Where) -> Sparsifier:
        return dataclasses.replace(self, backend="xla" if where.backend == "xla" else None).sparsifier()

    def init(self, aval: jax.ShapeDtypeStruct) -> EntriesState:
        del aval
        return starting_state(self.key)

    def apply(self, u: jax.Array, state: EntriesState) -> tuple[Entries, EntriesState]:
        following, words = split_words(state.key)
        rows, n = u.shape
        if rows == 0 or self.density == 1:
            share = share_of((u != 0).sum(axis=1, dtype=jnp.float32), rows * n)
            return Entries(u, density=self.density), told(state, following, share)
        sizes = finite(jnp.abs(u).astype(accumulation_dtype(u.dtype)))
        live = takes_part(u).sum(dtype=sizes.dtype)
        # Rounded as entries are, so that what is drawn is exactly as large as its probability says.
        step = threshold_for(sizes, jnp.maximum(self.density * n * live, 1)).astype(u.dtype).astype(sizes.dtype)
        values, kept = dither(u, words, step, prunes=True, backend=self.backend)
        return Entries(values, density=self.density), told(state, following, share_of(kept, rows * n))
