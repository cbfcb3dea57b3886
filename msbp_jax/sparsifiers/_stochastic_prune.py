"""Stochastic pruning: entries below a threshold become 0 or as large as the threshold."""

from __future__ import annotations

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp

from msbp_jax.formats import Entries, accumulation_dtype, finite
from msbp_jax.kernels import dither
from msbp_jax.kernels.residual import takes_part
from msbp_jax.sparsifiers._base import Sparsifier
from msbp_jax.sparsifiers._entries import EntriesState, share_of, split_words, starting_state, told
from msbp_jax.sparsifiers._keys import StartingKey
from msbp_jax.sparsifiers._where import Where


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
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"rate must be a number in (0, 1) (share of the entries below the threshold), got {rate!r}.")
    if not 0 < rate < 1:
        raise ValueError(
            f"rate must lie in (0, 1) (share of the entries below the threshold), got {rate}. "
            "msbp.dense() prunes nothing."
        )
    return _StochasticPrune(float(rate), None if key is None else StartingKey.checked(key), None).sparsifier()


@dataclasses.dataclass(frozen=True)
class _StochasticPrune:
    rate: float
    key: StartingKey | None
    backend: str | None

    def sparsifier(self) -> Sparsifier:
        name = f"stochastic_prune(rate={self.rate:g})"
        return Sparsifier(init=self.init, apply=self.apply, name=name, at=self.at, remembers=False)

    def at(self, where: Where) -> Sparsifier:
        return dataclasses.replace(self, backend="xla" if where.backend == "xla" else None).sparsifier()

    def init(self, aval: jax.ShapeDtypeStruct) -> EntriesState:
        del aval
        return starting_state(self.key)

    def apply(self, u: jax.Array, state: EntriesState) -> tuple[Entries, EntriesState]:
        following, words = split_words(state.key)
        rows, n = u.shape
        if rows == 0:
            return Entries(u, share=jnp.zeros((), jnp.float32)), told(state, following, jnp.zeros((), jnp.float32))
        sizes = finite(jnp.abs(u).astype(accumulation_dtype(u.dtype)))
        live = takes_part(u)
        counted = jnp.sum(jnp.isfinite(u) & live, axis=0, dtype=sizes.dtype).sum()
        mean = sizes.sum(axis=0).sum() / jnp.maximum(counted, 1)
        normal = statistics.NormalDist().inv_cdf((1 + self.rate) / 2) * math.sqrt(math.pi / 2)
        step = (normal * mean).astype(u.dtype).astype(sizes.dtype)  # rounded as entries are
        values, kept = dither(u, words, jnp.where(jnp.isfinite(step), step, 0), prunes=True, backend=self.backend)
        share = share_of(kept, rows * n)
        return Entries(values, share=share), told(state, following, share)
