"""The three ops of a sparse backward, one folder an op, one file a backend.

select       scores of the columns of each group of rows, and the k best       u -> index
grad_input   dx = p wᵀ                                                         p, w -> dx
grad_weight  dw = xᵀ p                                                         x, p -> dw
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from msbp_jax.formats import Columns
from msbp_jax.kernels import _dispatch
from msbp_jax.kernels.grad_input import IMPLEMENTATIONS as _GRAD_INPUT
from msbp_jax.kernels.grad_weight import IMPLEMENTATIONS as _GRAD_WEIGHT
from msbp_jax.kernels.select import IMPLEMENTATIONS as _SELECT

OPS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "select": _SELECT,
    "grad_input": _GRAD_INPUT,
    "grad_weight": _GRAD_WEIGHT,
}


def select(
    cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None, *, backend: str | None = None
) -> Int[Array, "G k"]:
    """Return, for each group of rows, the `k` columns with the largest sum of absolute values, ties to the lower one.

    Args:
      cotangent: `[rows, n]`, any floating dtype; scores are summed in float32 (float64 for float64).
      k: How many columns to keep, `1 <= k <= n`.
      rows_per_group: `r`; None for one group.
      backend: Name of a backend, or None to choose.

    Returns:
      `[G, k]`, int32, best first. A NaN counts as larger than everything else.
    """
    return _dispatch.run("select", _SELECT, backend, cotangent, k, rows_per_group)


def grad_input(
    cotangent: Columns,
    weight: Float[Array, ...],
    feature_axis: int,
    *,
    precision: Any = None,
    backend: str | None = None,
) -> Float[Array, "rows m"]:
    """Return `dx = p wᵀ` for a compact cotangent `p`.

    Args:
      cotangent: `p`, representing `[rows, n]`.
      weight: `[m, n]` if `feature_axis` is 1, `[n, m]` if it is 0.
      feature_axis: Where the `n` output features stand in `weight`.
      precision: As in `lax.dot_general`.
      backend: Name of a backend, or None to choose.

    Returns:
      `[rows, m]`, accumulated in at least float32.
    """
    return _dispatch.run("grad_input", _GRAD_INPUT, backend, cotangent, weight, feature_axis, precision)


def grad_weight(
    cotangent: Columns,
    inputs: Float[Array, "rows m"],
    feature_axis: int,
    *,
    precision: Any = None,
    backend: str | None = None,
) -> Float[Array, ...]:
    """Return `dw = xᵀ p` for a compact cotangent `p`.

    Args:
      cotangent: `p`, representing `[rows, n]`.
      inputs: `x`, `[rows, m]`.
      feature_axis: Where the `n` output features stand in the result.
      precision: As in `lax.dot_general`.
      backend: Name of a backend, or None to choose.

    Returns:
      `[m, n]` if `feature_axis` is 1, `[n, m]` if it is 0, accumulated in at least float32.
    """
    return _dispatch.run("grad_weight", _GRAD_WEIGHT, backend, cotangent, inputs, feature_axis, precision)


def backends() -> dict[str, tuple[str, ...]]:
    """Return, for each op, the backends that this installation has, in the order in which they are tried.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.backends()["grad_input"]
      ('xla',)
    """
    return {op: tuple(implementations) for op, implementations in OPS.items()}
