"""Sizes of tiles, and what fills arrays up to whole ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from msbp_jax._compat._pallas import pallas


def power_of_two(size: int, largest: int) -> int:
    """Return the size of a GPU tile that covers `size`: a power of two from 16 on, which a matrix unit wants."""
    return min(largest, max(16, pallas.next_power_of_2(size)))


def padded(array: jax.Array, *sizes: int, mode: str = "constant") -> jax.Array:
    """Return an array padded at the end of each axis to multiples of `sizes`; as it is if it fits."""
    missing = [(0, -size % multiple) for size, multiple in zip(array.shape, sizes, strict=True)]
    return jnp.pad(array, missing, mode=mode) if any(after for _, after in missing) else array


def tile_of(size: int, largest: int, multiple: int) -> int:
    """Return the size of equal tiles, multiples of `multiple` and at most `largest`, that cover `size` tightly."""
    tiles = -(-size // largest)
    exact = (size // count for count in range(tiles, 2 * tiles + 1) if size % (count * multiple) == 0)
    if (found := next(exact, None)) is not None:
        return found
    return -(-size // (tiles * multiple)) * multiple
