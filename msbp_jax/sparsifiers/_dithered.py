"""Dithered backprop: a quantisation by chance that makes most entries of the gradient 0, without bias."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax import _checks
from msbp_jax.formats import Entries, accumulation_dtype
from msbp_jax.kernels import dither, spread
from msbp_jax.sparsifiers._base import Sparsifier
from msbp_jax.sparsifiers._entries import (
    EntriesState,
    QuantizedState,
    share_of,
    split_words,
    starting_state,
    told,
)
from msbp_jax.sparsifiers._keys import StartingKey
from msbp_jax.sparsifiers._running import running
from msbp_jax.sparsifiers._where import Where


def dithered(scale: float, *, bits: Literal[8, 4] | None = None, key: jax.Array | None = None) -> Sparsifier:
    r"""Round the gradient to multiples of a step as large as its spread, by chance, so that most entries become 0.

    With `f` the fractional part of `g/Δ`,

        Δ = scale std(g),   S(g) = Δ floor(g/Δ + ν + 1/2),   ν ~ U(-1/2, 1/2),
        E[S(g)] = g,        Var[S(g)] = Δ² f (1 - f) <= Δ²/4.

    An entry smaller than Δ is 0 with probability `1 - |g|/Δ`. For a normal gradient 37 % of the entries are 0 at
    scale 1, 61 % at 2, 80 % at 4, 90 % at 8; gradients of networks have heavier tails and more zeros.

    Args:
      scale: `s`, the step in standard deviations of the gradient of the site; positive.
      bits: None for products of these floats. 8 or 4: levels `S(g)/Δ` are clipped to 127 or 7, and both products are
        made in 8 bits, with sums of 32: the other operand is rounded by its absolute maximum along the axis that is
        contracted (deterministic: unbiased is the product with the rounded operand). GPUs and TPUs multiply 8 bits; on
        an H200 the backward was no faster than a dense one for it (0.86 and 0.98 times). On a CPU it is emulated, with
        equal results, and no faster than dense.
      key: Typed PRNG key that the state starts from, `jax.random.key(0)` if None. Every site gets a key of its own from
        it, as do stacked layers, steps of a scan, members of a vmap, devices and microbatches; every step splits it.

    Returns:
      The sparsifier. Its state has the key, and running means for `msbp.metrics`: the density and, with `bits`, how
      many entries a step were clipped. The spread is that of all rows that are not exactly 0; where it is 0, g is
      passed on exactly. Gradients of biases are those of the whole g. What is not finite is passed on; with `bits` it
      makes all of the site's gradient NaN, as levels cannot. It serves layers of any width. On a CPU the native
      kernels skip the zeros; elsewhere, and for convolutions, the products are those of the whole matrix, and
      nothing is saved but, with bits, what a chip multiplies faster for having fewer.

    Raises:
      ValueError: `scale` is not positive and finite, or `bits` none of None, 8 and 4.
      TypeError: A value of the wrong type.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.dithered(4)
      dithered(scale=4)

    References:
      Wiedemann et al., Dithered backprop: A sparse and quantized backpropagation algorithm for more efficient deep
      neural network training, 2020 (arXiv 2004.04729).
    """
    meaning = "the step in standard deviations of the gradient"
    step = _checks.number("scale", scale, meaning)
    if not math.isfinite(step) or step <= 0:
        raise ValueError(
            f"scale must be positive and finite ({meaning}), got {scale}. msbp.dense() leaves a gradient as it is."
        )
    if bits is not None and (not isinstance(bits, int) or isinstance(bits, bool) or bits not in (8, 4)):
        raise ValueError(f"bits must be 8, 4, or None for products of floats, got {bits!r}.")
    return _Dithered(step, bits, None if key is None else StartingKey.checked(key), None).sparsifier()


@dataclasses.dataclass(frozen=True)
class _Dithered:
    scale: float
    bits: int | None
    key: StartingKey | None
    backend: str | None

    def sparsifier(self) -> Sparsifier:
        bits = "" if self.bits is None else f", bits={self.bits}"
        name = f"dithered(scale={self.scale:g}{bits})"
        return Sparsifier(init=self.init, apply=self.apply, name=name, at=self.at, remembers=False)

    def at(self, where: Where) -> Sparsifier:
        return dataclasses.replace(self, backend=where.maker).sparsifier()

    def init(self, aval: jax.ShapeDtypeStruct) -> EntriesState | QuantizedState:
        del aval
        start = starting_state(self.key)
        if self.bits is None:
            return start
        return QuantizedState(start.key, start.density, jnp.zeros((), jnp.float32), start.steps)

    def apply(
        self, u: jax.Array, state: EntriesState | QuantizedState
    ) -> tuple[Entries, EntriesState | QuantizedState]:
        following, words = split_words(state.key)
        rows, n = u.shape
        if rows == 0:
            kept = jnp.zeros((0,), jnp.float32)
            step, values = jnp.zeros((), jnp.float32), u
        else:
            step = self.scale * spread(u, backend=self.backend)
            step = jnp.where(jnp.isfinite(step), step, 0)
            # In 16 bits rounded as entries are: the multiples of most levels, 1, 2 and 4, are then exact everywhere.
            step = step.astype(u.dtype).astype(step.dtype)
            values, kept = dither(u, words, step, backend=self.backend)
        share = share_of(kept, rows * n)
        if isinstance(state, QuantizedState):
            p, clipped = self._in_levels(u, values, step)
            mean = running(state.clipped, clipped, state.steps)
            return p, told(state, following, share)._replace(clipped=mean)
        scale = None
        if u.dtype.itemsize < 4:  # then these are levels
            scale = jnp.where(step > 0, step, 1)
        return Entries(values, scale, share), told(state, following, share)

    def _in_levels(
        self, u: Float[Array, "rows n"], values: Float[Array, "rows n"], step: Float[Array, ""]
    ) -> tuple[Entries, Float[Array, ""]]:
        """Return a dithered gradient in levels that are clipped, and how many entries are."""
        assert self.bits is not None
        most = 2 ** (self.bits - 1) - 1
        wide = values.astype(accumulation_dtype(u.dtype))
        largest = jnp.max(jnp.abs(wide), initial=0)
        # Without a step these are entries: of one size, or 0, if there is no spread; else the spread is no number.
        one_size = jnp.all((wide == 0) | (jnp.abs(wide) == largest))
        worth = jnp.where(step > 0, step, jnp.where(one_size, largest, largest / most)).astype(wide.dtype)
        divisor = jnp.where(worth > 0, worth, 1)
        level = jnp.where((step > 0) & (u.dtype.itemsize < 4), wide, jnp.round(wide / divisor))
        clipped = jnp.sum(jnp.abs(level) > most, axis=0, dtype=jnp.float32).sum()
        level = jnp.where(jnp.isfinite(level), jnp.clip(level, -most, most), 0).astype(jnp.int8)
        scale = jnp.where(jnp.isfinite(largest), worth, jnp.nan)
        return Entries(level, scale, bits=self.bits, dtype=u.dtype), clipped
