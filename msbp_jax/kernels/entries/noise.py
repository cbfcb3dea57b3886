"""The noise of dithering: one number for each (key, row, column), by counting.

Every entry can be asked for by itself, in any order and on any platform, with the same bits: these are a few operations
on 32-bit words, which XLA, Pallas and the native kernels (`native/noise.h`) have alike. A row's number goes through a
bijection that the key decides, so that no two rows begin alike, and twists a hash of the column that starts there.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

_COLUMN_STEP, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


def uniform(
    key: UInt32[Array, " 2"], row_numbers: UInt32[Array, " rows"], columns: UInt32[Array, " n"]
) -> Float[Array, "rows n"]:
    """Return numbers that are uniform on the odd multiples of 2^-24 in (0, 1), float32.

    Args:
      key: Two words.
      row_numbers: Of each row.
      columns: Their numbers.
    """
    start = _mixed(_mixed(row_numbers ^ key[0]) ^ key[1])
    twist = _mixed((start + _word(_COLUMN_STEP)) ^ key[0])
    x = _mixed(((columns * _word(_COLUMN_STEP))[None, :] + start[:, None]) ^ twist[:, None]) >> 9
    # Both steps are exact, so that it does not matter whether a platform rounds them once or twice.
    return x.astype(jnp.int32).astype(jnp.float32) * 2.0**-23 + 2.0**-24


def _mixed(x: UInt32[Array, ...]) -> UInt32[Array, ...]:
    x = (x ^ (x >> 16)) * _word(_FIRST)
    x = (x ^ (x >> 15)) * _word(_SECOND)
    return x ^ (x >> 16)


def _word(number: int) -> UInt32[Array, ""]:
    return jnp.uint32(number)
