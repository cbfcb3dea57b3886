"""Products with a sparse weight in native code, float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.kernels.native import calls
from msbp_jax.weights import Pattern


def times(
    x: Float[Array, "rows inner"], values: Float[Array, " entries"], pattern: Pattern, turned: bool, precision: Any
) -> Float[Array, "rows outer"]:
    """See `msbp_jax.kernels.weights.times`."""
    del precision
    rows, (m, n) = x.shape[0], pattern.matrix_shape
    lists = [pattern.input_starts, pattern.features] if turned else [pattern.starts, pattern.inputs]
    operands = [values, *lists, pattern.order, x]
    results = [((rows, m if turned else n), jnp.float32)]
    split = ("native weight_times", rows, 1)
    return calls.call("weight_times", operands, results, split=split, ordered=turned)[0]


def gradient(
    x: Float[Array, "rows m"], g: Float[Array, "rows n"], pattern: Pattern, precision: Any
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.weights.gradient`."""
    del precision
    rows = x.shape[0]
    operands = [x, g, pattern.starts, pattern.inputs]
    results = [((pattern.entries,), jnp.float32)]
    return calls.call("weight_gradient", operands, results, split=("native weight_gradient", rows, 1))[0]
