"""`grad_weight` in native code: kept rows of both operands are gathered while they are packed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Rows
from msbp_jax.kernels.native import calls
from msbp_jax.kernels.rows.axes import grad_weight_axes


def grad_weight(
    cotangent: Rows, inputs: Float[Array, "rows m"], feature_axis: int, precision: Any = None, dtype: Any = None
) -> Float[Array, ...]:
    """See `msbp_jax.kernels.grad_weight`. Products are float32 throughout, whatever `precision` asks for."""
    del precision
    calls.check(cotangent.values, inputs)
    n, m = cotangent.shape[1], inputs.shape[1]
    results = [((m, n) if feature_axis == 1 else (n, m), jnp.float32)]
    operands = [cotangent.values, cotangent.weight, inputs]
    axes = grad_weight_axes(feature_axis)
    (dw,) = calls.call("rows_grad_weight", operands, results, by=axes, features_last=feature_axis == 1)
    return dw.astype(dtype or jnp.float32)
