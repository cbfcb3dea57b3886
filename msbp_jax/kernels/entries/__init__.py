"""The ops for cotangents any of whose entries may be 0: `Entries`. One folder an op, one file a backend.

dither        g -> multiples of a step, or pruned entries, most of them 0; and how many of each row are not
row_moments   g -> of each row the number of its finite entries, their mean and the sum of squares about it
grad_input    dx = p wᵀ
grad_weight   dw = xᵀ p

The native products list the entries that are not 0; XLA's are those of the matrix, in 8 bits where levels are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msbp_jax.kernels.entries.dither import IMPLEMENTATIONS as _DITHER
from msbp_jax.kernels.entries.grad_input import IMPLEMENTATIONS as _GRAD_INPUT
from msbp_jax.kernels.entries.grad_weight import IMPLEMENTATIONS as _GRAD_WEIGHT
from msbp_jax.kernels.entries.row_moments import IMPLEMENTATIONS as _ROW_MOMENTS

OPS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "dither": _DITHER,
    "row_moments": _ROW_MOMENTS,
    "grad_input": _GRAD_INPUT,
    "grad_weight": _GRAD_WEIGHT,
}
