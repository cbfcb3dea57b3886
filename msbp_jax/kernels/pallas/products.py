"""In which dtype and how exactly a kernel multiplies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def common_dtype(values: Any, other: Any) -> jnp.dtype:
    """Return the dtype that values and a weight or inputs are multiplied in; 8-bit values fit that of the other."""
    return jnp.dtype(jnp.float32) if values == jnp.float32 else jnp.dtype(other)


def matmul_precision(precision: Any) -> Any:
    """Return a precision of `lax.dot_general` as a kernel takes it.

    Raises:
      NotImplementedError: An algorithm, or one that differs between the operands.
    """
    if isinstance(precision, tuple | list):
        if len(set(precision)) > 1:
            raise NotImplementedError(f"the kernels take one precision for both operands, got {precision}")
        precision = precision[0]
    if precision is None:
        return None
    try:
        known = jax.lax.Precision(precision)
    except ValueError:
        raise NotImplementedError(f"the kernels take the precisions of jax.lax.Precision, got {precision}") from None
    return jax.lax.Precision.DEFAULT if known == jax.lax.Precision.DEFAULT else jax.lax.Precision.HIGHEST
