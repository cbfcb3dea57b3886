"""What the Pallas backends of `grad_input` share: what they decline, a weight transposed, rows cut off."""

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


def grad_input(
    platform: str,
    product: Callable[..., jax.Array],
    cotangent: Columns,
    weight: Float[Array, ...],
    feature_axis: int,
    precision: Any,
    dtype: Any,
) -> Float[Array, "rows m"]:
    """Run `grad_input` with a platform's kernels.

    Args:
      platform: "gpu" or "tpu".
      product: `(values[G, r, k], index[G, k], scale[G], w[n, m], precision, dtype) -> dx[G, r, m]`.
      cotangent: As in `msbp_jax.kernels.grad_input`.
      weight: As in `msbp_jax.kernels.grad_input`.
      feature_axis: Where the `n` output features stand.
      precision: As in `lax.dot_general`.
      dtype: Of the result; None for that of the sums.
    """
    check_product(platform, cotangent, weight, dtype)
    precision = matmul_precision(precision)
    dtype = dtype or accumulation_dtype(weight.dtype)

    def function(results: Shapes) -> Call:
        rows = results[0][0][0]

        def call(values: jax.Array, index: jax.Array, scale: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
            w = weight if feature_axis == 0 else weight.T
            return (product(values, index, scale, w, precision, dtype).reshape(-1, w.shape[1])[:rows],)

        return call

    results = [((cotangent.shape[0], weight.shape[1 - feature_axis]), dtype)]
    split = ("grad_input", cotangent.shape[0], cotangent.rows_per_group)
    return calls.run("grad_input", function, [*parts(cotangent), weight], results, split)[0]
