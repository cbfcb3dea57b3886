"""Products of the XLA backend: sums in float32 or better, whatever the platform makes of a narrower dtype."""

from __future__ import annotations

from typing import Any

from jax import lax
from jaxtyping import Array, Float

from msbp_jax.formats import accumulation_dtype
from msbp_jax.kernels.choice import target


def dot(lhs: Float[Array, ...], rhs: Float[Array, ...], numbers: Any, precision: Any, dtype: Any) -> Float[Array, ...]:
    """Return `lax.dot_general` in the dtype of its sums, or on an accelerator, which rounds as it writes, in `dtype`.

    Args:
      lhs: As in `lax.dot_general`.
      rhs: As in `lax.dot_general`.
      numbers: Its dimension numbers.
      precision: As in `lax.dot_general`.
      dtype: What is wanted in the end; None for the dtype of the sums.
    """
    accumulator = accumulation_dtype(lhs.dtype, rhs.dtype)
    if target.platform() == "cpu":
        # XLA widens them itself in most programs; the others it cannot run on a CPU: BF16 x BF16 = F32.
        lhs, rhs, dtype = lhs.astype(accumulator), rhs.astype(accumulator), accumulator
    return lax.dot_general(lhs, rhs, numbers, precision=precision, preferred_element_type=dtype or accumulator)
