"""What sparsifiers have in common that make single entries 0 by chance: their state, their noise, their threshold."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from msbp_jax import _compat
from msbp_jax.formats import Entries, accumulation_dtype
from msbp_jax.formats import finite as finite_or_zero
from msbp_jax.kernels import dither
from msbp_jax.kernels.residual import takes_part
from msbp_jax.sparsifiers._base import Sparsifier
from msbp_jax.sparsifiers._keys import StartingKey
from msbp_jax.sparsifiers._running import running
from msbp_jax.sparsifiers._where import Where

_ITERATIONS = 24  # Newton's method; it stops when it is there, after five to ten


class EntriesState(NamedTuple):
    """State of `dithered`, `sample_entries` and `stochastic_prune`.

    Attributes:
      key: Typed PRNG key, split at each step.
      density: Running mean of the share of the entries that are not 0, float32, `[]`.
      steps: How many steps the site has seen.
    """

    key: jax.Array
    density: jax.Array
    steps: jax.Array

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """The running mean of the density, over some ten steps."""
        return {"density": jnp.mean(self.density)}


class QuantizedState(NamedTuple):
    """State of `dithered` with `bits`.

    Attributes:
      key: Typed PRNG key, split at each step.
      density: Running mean of the share of the entries that are not 0, float32, `[]`.
      clipped: Running mean of how many entries a step had too many levels.
      steps: How many steps the site has seen.
    """

    key: jax.Array
    density: jax.Array
    clipped: jax.Array
    steps: jax.Array

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """Running means of the density and of the number of entries clipped in a step, over some ten steps."""
        return {"density": jnp.mean(self.density), "clipped": jnp.mean(self.clipped)}


_compat.serializable(EntriesState)
_compat.serializable(QuantizedState)


def starting_state(key: StartingKey | None) -> EntriesState:
    """Return the state before the first step."""
    zeros = [jnp.zeros((), jnp.float32) for _ in range(2)]  # a buffer each, to be donated
    return EntriesState(jax.random.key(0) if key is None else key.array, *zeros)


def told[S: (EntriesState, QuantizedState)](state: S, key: jax.Array, share: jax.Array) -> S:
    """Return the state after a step, the clipped entries as they were."""
    density = running(state.density, share, state.steps)
    return state._replace(key=key, density=density, steps=state.steps + 1)


def split_words(key: jax.Array) -> tuple[jax.Array, UInt32[Array, " 2"]]:
    """Return the key for the next step, and two words for the noise of this one."""
    following, now = jax.random.split(key)
    return following, jax.random.bits(now, (2,), jnp.uint32)


def share_of(kept: Float[Array, " rows"], entries: Any) -> Float[Array, ""]:
    """Return the share of the entries that are kept.

    Args:
      kept: How many of each row.
      entries: How many there are.
    """
    return kept.sum() / jnp.maximum(jnp.asarray(entries, jnp.float32), 1)


# 1/t, how many are kept for certain, whether it is there, and the steps so far.
type _Newton = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def threshold_for(sizes: Float[Array, "rows n"], count: Float[Array, ""]) -> Float[Array, ""]:
    """Return the t with `sum min(1, sizes / t) = count`; 0 if there are no more sizes than that.

    The sum is concave in 1/t and made of straight pieces: Newton's method, begun below the root, comes up to it, and is
    there when no more sizes than before are kept for certain.

    Args:
      sizes: Not negative; 0 for what is not chosen among.
      count: How many are to be kept, on the average.
    """
    total = lambda array: array.sum(axis=0).sum()  # column by column first: a CPU does that in vectors

    def closer(carry: _Newton) -> _Newton:
        c, certain, _, steps = carry
        kept = c * sizes >= 1
        number, rest = total(kept.astype(sizes.dtype)), total(jnp.where(kept, 0, sizes))
        better = jnp.where(rest > 0, (count - number) / jnp.where(rest > 0, rest, 1), c)
        return better, number, certain == number, steps + 1

    begun = count / jnp.maximum(total(sizes), jnp.finfo(sizes.dtype).tiny)
    none = jnp.full_like(begun, -1)
    going = lambda carry: ~carry[2] & (carry[3] < _ITERATIONS)
    c = lax.while_loop(going, closer, (begun, none, jnp.zeros_like(begun, bool), jnp.zeros_like(begun, jnp.int32)))[0]
    enough = total((sizes > 0).astype(sizes.dtype)) <= count
    return jnp.where(enough | ~(c > 0), 0, 1 / jnp.where(c > 0, c, 1))


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A sparsifier that makes entries below a threshold 0 or as large as it, by chance.

    Attributes:
      name: For reports.
      key: Where the state starts.
      backend: Of making them; None to choose.
    """

    name: str
    key: StartingKey | None
    backend: str | None

    def sparsifier(self) -> Sparsifier:
        """Return it."""
        return Sparsifier(init=self.init, apply=self.apply, name=self.name, at=self.at, remembers=False)

    def at(self, where: Where) -> Sparsifier:
        """Return what serves at a site: the same, of any width."""
        return dataclasses.replace(self, backend=where.maker).sparsifier()

    def init(self, aval: jax.ShapeDtypeStruct) -> EntriesState:
        """Return the state before the first step."""
        del aval
        return starting_state(self.key)

    def threshold(
        self, sizes: Float[Array, "rows n"], finite: Bool[Array, "rows n"], live: Bool[Array, "rows 1"]
    ) -> Float[Array, ""]:
        """Return the threshold; 0, or what is no number, leaves all as it is.

        Args:
          sizes: Of entries, 0 where they are not finite.
          finite: Which are.
          live: Which rows take part.
        """
        raise NotImplementedError

    @property
    def density(self) -> float | None:
        """The share of the entries that is kept, where it is known beforehand."""
        return None

    def apply(self, u: jax.Array, state: EntriesState) -> tuple[Entries, EntriesState]:
        """Return what is kept of u, and the next state."""
        following, words = split_words(state.key)
        rows, n = u.shape
        if rows == 0:
            values, kept = u, jnp.zeros((0,), jnp.float32)
        else:
            sizes = finite_or_zero(jnp.abs(u).astype(accumulation_dtype(u.dtype)))
            step = self.threshold(sizes, jnp.isfinite(u), takes_part(u))
            # Rounded as entries are, so that what is drawn is exactly as large as its probability says.
            step = step.astype(u.dtype).astype(sizes.dtype)
            step = jnp.where(jnp.isfinite(step), step, 0)
            values, kept = dither(u, words, step, prunes=True, backend=self.backend)
        share = share_of(kept, rows * n)
        p = Entries(values, share=None if self.density is not None else share, density=self.density)
        return p, told(state, following, share)
