"""What the Pallas backends of `select` share: scores by XLA, then the platform's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Columns
from msbp_jax.kernels.columns.column_sums import column_sums
from msbp_jax.kernels.columns.select import xla
from msbp_jax.kernels.opaque.partition import Call, Shapes
from msbp_jax.kernels.pallas import calls
from msbp_jax.kernels.residual import Remembered

# (g, m, scores, k, r) -> values, index: the entries of u = g + m in the k columns with the largest scores of each
# group of r rows, and which columns these are, in order. g[rows, n] is float32 or bfloat16; m is None, or a memory and
# which rows it is added to; scores[G, n] are not negative.
type KeptColumns = Callable[[jax.Array, Remembered | None, jax.Array, int, int], tuple[jax.Array, jax.Array]]


def select(
    platform: str, kept_columns: KeptColumns, cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None
) -> Columns:
    """Run `select` with a platform's kernels."""
    calls.check(platform, cotangent.dtype)
    rows, n = cotangent.shape
    r = min(rows_per_group or rows, rows)

    def function(results: Shapes) -> Call:
        del results

        def call(g: jax.Array) -> tuple[jax.Array, ...]:
            here = min(r, g.shape[0])
            return kept_columns(g, None, column_sums(g, None, here)[0], k, here)

        return call

    results = [((-(-rows // r), r, k), cotangent.dtype), ((-(-rows // r), k), jnp.int32)]
    choose = functools.partial(xla.choose_over, k)
    values, index = calls.run("select", function, [cotangent], results, ("select", rows, r), choose)
    return Columns(values, index, (rows, n))
