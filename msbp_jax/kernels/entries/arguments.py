"""What the ops for `Entries` accept. Wrong input raises here, before tracing."""

from __future__ import annotations

import jax.numpy as jnp

from msbp_jax.formats import Entries


def check_entries(cotangent: Entries) -> None:
    """Check the parts of a cotangent.

    Raises:
      TypeError: Its values are no floating-point array or, with `bits`, not int8; its scale is not floating.
      ValueError: They do not fit each other.
    """
    values, scale = cotangent.values, cotangent.scale
    if cotangent.bits is not None and values.dtype != jnp.int8:
        raise TypeError(f"cotangent.values must be int8 levels where bits={cotangent.bits}, got {values.dtype}.")
    if cotangent.bits is None and not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"cotangent.values must be a floating-point array, got {values.dtype}.")
    if values.ndim != 2:
        raise ValueError(f"cotangent.values must be [rows, n], got {values.shape}.")
    if scale is not None and (scale.shape != () or not jnp.issubdtype(scale.dtype, jnp.floating)):
        raise ValueError(f"cotangent.scale must be one floating-point number, got {scale.dtype}{list(scale.shape)}.")
