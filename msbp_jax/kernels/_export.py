"""What `jax.export` cannot write into a file: a hint to XLA is left out there, a native kernel says what to do instead.

Only the lowering of a program knows what it is for, so that both are primitives of our own.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from msbp_jax import _compat


def unless_exported(hint: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """Return `hint(array)`, which must be `array` up to how it is computed; in an exported program the array itself."""
    return _compat.lowered_by_purpose(array, hint=hint, refusal="")


def not_exported(array: jax.Array, refusal: str) -> jax.Array:
    """Return the array; exporting the program raises `NotImplementedError` with this message."""
    return _compat.lowered_by_purpose(array, hint=None, refusal=refusal)
