"""What the Pallas backends of `grad_weight` share: what they decline, and the shape of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns, accumulation_dtype
from msbp_jax.kernels.columns._pallas import check_product, parts
from msbp_jax.kernels.opaque.partition import Call, Shapes
from msbp_jax.kernels.pallas import calls
from msbp_jax.kernels.pallas.products import matmul_precision


def grad_weight(
    platform: str,
    product: Callable[..., jax.Array],
    cotangent: Columns,
    inputs: Float[Array, "rows m"],
    feature_axis: int,
    precision: Any,
    dtype: Any,
) -> Float[Array, ...]:
    """Run `grad_weight` with a platform's kernels.

    Args:
      platform: "gpu" or "tpu".
      product: `(values[G, r, k], index[G, k], scale[G], x[rows, m], n, feature_axis, precision, dtype) -> dw`.
      cotangent: As in `msbp_jax.kernels.grad_weight`.
      inputs: As in `msbp_jax.kernels.grad_weight`.
      feature_axis: Where the `n` output features stand.
      precision: As in `lax.dot_general`.
      dtype: Of the result; None for that of the sums.
    """
    check_product(platform, cotangent, inputs, dtype)
    precision = matmul_precision(precision)
    dtype = dtype or accumulation_dtype(inputs.dtype)
    m, n = inputs.shape[1], cotangent.shape[1]

    def function(results: Shapes) -> Call:
        del results

        def call(values: jax.Array, index: jax.Array, scale: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
            return (product(values, index, scale, x, n, feature_axis, precision, dtype),)

        return call

    results = [((m, n) if feature_axis == 1 else (n, m), dtype)]
    split = ("grad_weight", cotangent.shape[0], cotangent.rows_per_group)
    return calls.run("grad_weight", function, [*parts(cotangent), inputs], results, split)[0]
