"""What the ops for `Rows` accept. Wrong input raises here, before tracing."""

from __future__ import annotations

import jax.numpy as jnp

from msbp_jax.formats import Rows


def check_rows(cotangent: Rows) -> None:
    """Check the parts of a cotangent.

    Raises:
      TypeError: They are not floating-point arrays.
      ValueError: They do not fit each other.
    """
    for name, array in (("values", cotangent.values), ("weight", cotangent.weight)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"cotangent.{name} must be a floating-point array, got {array.dtype}.")
    values, weight = cotangent.values.shape, cotangent.weight.shape
    if len(values) != 2 or weight != values[:1]:
        raise ValueError(f"cotangent.values must be [rows, n] and cotangent.weight [rows], got {values} and {weight}.")
