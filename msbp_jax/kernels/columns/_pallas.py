"""What the Pallas backends of both products share: what they decline, and the parts of a compact cotangent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax.formats import Columns
from msbp_jax.kernels.pallas import calls


def check_product(platform: str, cotangent: Columns, other: jax.Array, dtype: Any) -> None:
    """Decline what the kernels do not do, for a product that is to be written in `dtype`."""
    calls.check(platform, other.dtype, cotangent.values.dtype if cotangent.scale is None else None, dtype)


def parts(cotangent: Columns) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return values, index and scale, which is 1 where there is none."""
    scale = cotangent.scale
    return cotangent.values, cotangent.index, jnp.ones(cotangent.values.shape[:1]) if scale is None else scale
