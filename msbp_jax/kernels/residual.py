"""What a memory adds to a gradient, and what is left for it of what was not propagated.

A row of the gradient that is exactly 0 (padding, a masked label) takes no part: nothing is added to it, it has no
score, and nothing is left of it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msbp_jax.formats import Format, accumulation_dtype, finite


class Remembered(NamedTuple):
    """What is added to a gradient.

    Attributes:
      memory: float32, `[n]` or `[rows, n]`.
      live: Which rows it is added to, `[rows, 1]`.
    """

    memory: Float[Array, ...]
    live: Bool[Array, "rows 1"]


def takes_part(g: Float[Array, "rows n"]) -> Bool[Array, "rows 1"]:
    """Return which rows take part: those with an entry that is not 0, be it too small for XLA to tell it from 0."""
    bits = jax.lax.bitcast_convert_type(g, f"uint{8 * g.dtype.itemsize}")
    return jnp.any(bits << 1 != 0, axis=1, keepdims=True)  # the shift drops the sign, as -0 is 0


def add_memory(
    g: Float[Array, "rows n"], memory: Float[Array, ...], live: Bool[Array, "rows 1"]
) -> Float[Array, "rows n"]:
    """Return `u = g + m`, m being `[n]` or `[rows, n]`, in the dtype that sums are made in; 0 where a row is idle."""
    dtype = accumulation_dtype(g.dtype)
    remembered = memory.astype(dtype)
    u = g.astype(dtype) + (remembered if memory.ndim == 2 else remembered[None, :])
    return jnp.where(live, u, jnp.zeros((), dtype))


def left_of(
    u: Float[Array, "rows n"], p: Format, live: Bool[Array, "rows 1"], *, by_slot: bool
) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """Return what is left of u, entries that are not finite as 0, and how much counts in it, both float32.

    Args:
      u: `g + m`.
      p: What is propagated.
      live: Which rows take part.
      by_slot: Whether each row keeps its own: `u - p`, `[rows, n]`, and `live` as numbers, `[rows, 1]`. Otherwise the
        sum over rows, `[n]`, and the number of rows that take part, `[1]`.
    """
    left = p.left_of(u) if by_slot else p.sum_left_of(u, live)
    rows = live.astype(jnp.float32)
    return finite(left.astype(jnp.float32)), rows if by_slot else rows.sum(axis=0)
