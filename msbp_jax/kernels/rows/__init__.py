"""The ops for cotangents of which whole rows are kept: `Rows`. One folder an op, one file a backend.

How many rows are kept is known when the program runs. Native kernels take as many as there are; XLA, whose shapes are
fixed, takes the next of a few sizes (`ladder`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msbp_jax.kernels.rows.grad_input import IMPLEMENTATIONS as _GRAD_INPUT
from msbp_jax.kernels.rows.grad_weight import IMPLEMENTATIONS as _GRAD_WEIGHT
from msbp_jax.kernels.rows.ladder import climb as climb
from msbp_jax.kernels.rows.ladder import largest_of_members as largest_of_members
from msbp_jax.kernels.rows.live import live_rows as live_rows

OPS: dict[str, Mapping[str, Callable[..., Any]]] = {"grad_input": _GRAD_INPUT, "grad_weight": _GRAD_WEIGHT}
