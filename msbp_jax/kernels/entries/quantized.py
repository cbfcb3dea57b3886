"""Products in 8 bits: levels of a cotangent times an operand that is rounded to 8 bits slice by slice.

The other operand b is quantised by absolute maximum along the axis that is contracted, for each slice of the other,

    q = round(b / a),   a = max |b| / 127,   sum_t p_it b_tj  ~  scale a_j sum_t level_it q_tj,

in whole numbers of 32 bits, where the platform multiplies 8 by 8 bits. On a CPU, whose XLA does so slowly, the sums are
made in float32, of so few terms at once that each is exact, and are equal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from msbp_jax import _compat
from msbp_jax.formats import Entries
from msbp_jax.kernels.choice import target

_LARGEST = 127


def quantized_dot(p: Entries, other: Float[Array, ...], axes: tuple[int, int], dtype: Any) -> Float[Array, "a b"]:
    """Return the product of a cotangent in whole levels and an operand that is quantised here.

    Args:
      p: The cotangent, `values` int8.
      other: The other operand, two axes.
      axes: Which axis of each is contracted.
      dtype: Of the result; None for float32.
    """
    q, slices = quantized(other, axes[1])
    sums = int_dot(p.values, q, axes, largest=_LARGEST if p.bits == 8 else 7)
    scaled = sums.astype(slices.dtype) * (slices * p.scale_or_one().astype(slices.dtype))[None, :]
    return scaled.astype(dtype or slices.dtype)


def quantized(other: Float[Array, ...], axis: int) -> tuple[Int[Array, ...], Float[Array, " slices"]]:
    """Return an operand in 8 bits, and what 1 is worth in each slice, NaN where a slice is not finite.

    Args:
      other: The operand.
      axis: Which of its two axes is contracted.
    """
    b = other.astype(jnp.float64 if other.dtype == jnp.float64 else jnp.float32)
    largest = jnp.max(jnp.abs(b), axis=axis, initial=0)
    worth = jnp.where(jnp.isfinite(largest), largest / _LARGEST, jnp.nan)
    divisor = jnp.expand_dims(jnp.where(worth > 0, worth, 1), axis)
    level = jnp.clip(jnp.round(b / divisor), -_LARGEST, _LARGEST)
    return jnp.where(jnp.isfinite(level), level, 0).astype(jnp.int8), worth


def int_dot(
    lhs: Int[Array, ...], rhs: Int[Array, ...], axes: tuple[int, int], largest: int = _LARGEST
) -> Int[Array, "a b"]:
    """Return a product of whole numbers of 8 bits, exact, int32: up to 133,000 terms of the largest numbers.

    Args:
      lhs: int8, two axes.
      rhs: int8, two axes.
      axes: Which axis of each is contracted.
      largest: The largest number of `lhs`, for how many products a float holds.
    """
    if not emulates_8_bits() or _compat.is_symbolic(*lhs.shape, *rhs.shape):
        return lax.dot_general(lhs, rhs, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.int32)
    return _exact_in_floats(jnp.moveaxis(lhs, axes[0], 0), jnp.moveaxis(rhs, axes[1], 0), largest)


def emulates_8_bits() -> bool:
    """Whether products in 8 bits are made of floats on the platform that the program is for."""
    return target.platform() == "cpu"


def _exact_in_floats(lhs: Int[Array, "t a"], rhs: Int[Array, "t b"], largest: int) -> Int[Array, "a b"]:
    """Return it by float32 sums of so few products that none reaches 2^24."""
    at_once = 2**24 // (largest * _LARGEST)

    def part(a: jax.Array, b: jax.Array) -> jax.Array:
        dims = (((0,), (0,)), ((), ()))
        whole = lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dims, precision="highest")
        return whole.astype(jnp.int32)

    length = lhs.shape[0]
    if length <= at_once:
        return part(lhs, rhs)
    chunks = -(-length // at_once)
    cut = lambda array: jnp.pad(array, ((0, chunks * at_once - length), (0, 0))).reshape(chunks, at_once, -1)
    add = lambda total, both: (total + part(*both), None)
    return lax.scan(add, jnp.zeros((lhs.shape[1], rhs.shape[1]), jnp.int32), (cut(lhs), cut(rhs)))[0]
