"""The codec of one leaf of a state: from its new value to the cotangents of its carriers, and back.

float      total, weight   the new value is their quotient; the old one where the weight is 0
key        ran             the next of the key's own series if anything ran
bool       total, ran      whether any use says True
integer    digits          what uses add to it, in digits of 16 bits, which a float32 holds exactly
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.sparsifiers._keys import select_keys
from msbp_jax.sparsifiers._weighted import averages, quotient

type Carriers = tuple[jax.Array, ...]

_DIGIT_BITS = 16


def carriers_of(leaf: jax.Array) -> Carriers:
    """Return the carriers of a leaf: zeros, with respect to which the loss is differentiated too."""

    def zeros(dtype: Any) -> jax.Array:
        return _compat.zeros_placed_like(leaf, dtype)

    if averages(leaf):
        return zeros(_total_dtype(leaf)), zeros(jnp.float32)
    if _compat.is_key(leaf):
        return (zeros(jnp.float32),)
    if leaf.dtype == jnp.bool_:
        return zeros(jnp.float32), zeros(jnp.float32)
    return tuple(zeros(jnp.float32) for _ in range(_digits(leaf)))


def given(old: jax.Array, total: jax.Array, weight: jax.Array) -> Carriers:
    """Return the cotangents of a leaf's carriers for one use.

    Args:
      old: The leaf.
      total: Its new value, times its weight if it holds numbers.
      weight: That weight.
    """
    if averages(old):
        return total.astype(_total_dtype(old)), weight.astype(jnp.float32)
    if _compat.is_key(old):
        return (jnp.ones(old.shape, jnp.float32),)
    if old.dtype == jnp.bool_:
        return total.astype(jnp.float32), jnp.ones(old.shape, jnp.float32)
    change = _widened(_as_unsigned(total) - _as_unsigned(old))
    mask = jnp.asarray(2**_DIGIT_BITS - 1, change.dtype)
    shifts = [jnp.asarray(_DIGIT_BITS * place, change.dtype) for place in range(_digits(old))]
    return tuple((jnp.right_shift(change, shift) & mask).astype(jnp.float32) for shift in shifts)


def narrowed(carriers: Carriers, weight: tuple[int, ...] | None) -> Carriers:
    """Return a leaf's carriers as a site gives them: a weight has one entry where it is the same along an axis.

    Args:
      carriers: As `unwrap` returns them.
      weight: Shape of the weight, for a leaf of numbers; None for others.
    """
    if weight is None:
        return carriers
    total, counts = carriers
    axes = tuple(axis for axis, (have, want) in enumerate(zip(counts.shape, weight, strict=True)) if want < have)
    return total, counts.sum(axis=axes, keepdims=True)


def collected(old: jax.Array, series: jax.Array | None, cotangents: Carriers) -> jax.Array:
    """Return the new leaf from what uses gave its carriers; `series` is the next of a key, None for other leaves."""
    if averages(old):
        return quotient(old, *cotangents)
    if series is not None:
        return select_keys(cotangents[0] > 0, series, old)
    if old.dtype == jnp.bool_:
        total, ran = cotangents
        return jnp.where(ran > 0, total > 0, old)
    unsigned = _as_unsigned(old)
    wide = _widened(unsigned).dtype
    digits = [
        (jnp.round(d).astype(wide) << jnp.asarray(_DIGIT_BITS * place, wide)) for place, d in enumerate(cotangents)
    ]
    change = sum(digits[1:], digits[0]).astype(unsigned.dtype)
    return jax.lax.bitcast_convert_type(unsigned + change, old.dtype)


def _total_dtype(leaf: jax.Array) -> Any:
    wide = jnp.issubdtype(leaf.dtype, jnp.complexfloating) or leaf.dtype == jnp.float64
    return leaf.dtype if wide else jnp.float32


def _digits(leaf: jax.Array) -> int:
    return -(-8 * leaf.dtype.itemsize // _DIGIT_BITS)


def _as_unsigned(leaf: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))


def _widened(unsigned: jax.Array) -> jax.Array:
    return unsigned if unsigned.dtype.itemsize >= 4 else unsigned.astype(jnp.uint32)
