"""The ops for cotangents of which some columns are kept: `Columns`. One folder an op, one file a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msbp_jax.kernels.columns.grad_input import IMPLEMENTATIONS as _GRAD_INPUT
from msbp_jax.kernels.columns.grad_weight import IMPLEMENTATIONS as _GRAD_WEIGHT
from msbp_jax.kernels.columns.select import IMPLEMENTATIONS as _SELECT
from msbp_jax.kernels.columns.select_with_memory import IMPLEMENTATIONS as _SELECT_WITH_MEMORY

OPS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "select": _SELECT,
    "select_with_memory": _SELECT_WITH_MEMORY,
    "grad_input": _GRAD_INPUT,
    "grad_weight": _GRAD_WEIGHT,
}
