"""Pallas, which takes nearly as long to import as this package. Only the kernels written in it import this file."""

from __future__ import annotations

from jax.experimental import pallas as pallas
from jax.experimental.pallas import tpu as pallas_tpu  # noqa: F401

try:
    from jax.experimental.pallas import triton as pallas_triton
except ImportError:  # deprecated since JAX 0.11, to be removed in some later version
    pallas_triton = None  # type: ignore[assignment]
