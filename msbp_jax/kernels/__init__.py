"""The ops of a sparse backward.

select              the k best columns of each group of rows, and their entries    u -> p
select_with_memory  the same of u = g + m, and what is left of u                   g, m -> p, left, rows
grad_input          dx = p wᵀ                                                      p, w -> dx
grad_weight         dw = xᵀ p                                                      x, p -> dw

A folder for each layout of what is kept (`columns`, `rows`), in it a folder an op and a file a backend; beside them a
room for what belongs to one compiler (`native`, `pallas`, `xla`), to calls that it cannot look into (`opaque`), and to
choosing a backend (`choice`).
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from msbp_jax.formats import Columns, Format, Rows
from msbp_jax.kernels import rows
from msbp_jax.kernels.choice import dispatch, target
from msbp_jax.kernels.choice.layer import layer_of
from msbp_jax.kernels.choice.order import products_order, selection_order
from msbp_jax.kernels.choice.patches import patches_pay as patches_pay
from msbp_jax.kernels.choice.rows import rows_pay_below as rows_pay_below
from msbp_jax.kernels.columns import OPS as OPS
from msbp_jax.kernels.columns.arguments import (
    check_inputs,
    check_memory,
    check_selection,
    check_weight,
    checked_columns,
)
from msbp_jax.kernels.native.calls import NOT_BUILT as NOT_BUILT
from msbp_jax.kernels.rows import largest_of_members as largest_of_members
from msbp_jax.kernels.rows import live_rows as live_rows
from msbp_jax.kernels.rows.arguments import check_rows


def select(
    cotangent: Float[Array, "rows n"], k: int, rows_per_group: int | None, *, backend: str | None = None
) -> Columns:
    """Keep, for each group of rows, the `k` columns with the largest sum of absolute values, ties to the lower one.

    Args:
      cotangent: `[rows, n]`, any floating dtype; scores are summed in float32 (float64 for float64).
      k: How many columns to keep, `1 <= k <= n`.
      rows_per_group: `r`; None for one group.
      backend: Name of a backend, or None to choose.

    Returns:
      The kept columns; in which order they stand within a group is the backend's affair. A NaN counts as larger than
      everything else.

    Raises:
      TypeError: A value of the wrong type or dtype.
      ValueError: A value of the wrong rank or size, or an unknown backend.
    """
    check_selection(cotangent, k, rows_per_group)
    order = selection_order(cotangent.shape[0], rows_per_group)
    return dispatch.run("select", OPS["select"], backend, cotangent, k, rows_per_group, order=order)


def select_with_memory(
    cotangent: Float[Array, "rows n"],
    memory: Float[Array, ...],
    k: int,
    rows_per_group: int | None,
    *,
    backend: str | None = None,
) -> tuple[Columns, Float[Array, ...], Float[Array, ...]]:
    """Apply `select` to `u = g + m` and return what is left of it, `u - p`.

    A row of `g` that is exactly 0 takes no part: nothing is added to it, and nothing is left of it.

    Args:
      cotangent: `g`, `[rows, n]`, any floating dtype.
      memory: `m`: `[n]`, added to every row that takes part; or `[rows, n]`, one for each.
      k: How many columns to keep, `1 <= k <= n`.
      rows_per_group: `r`; None for one group.
      backend: Name of a backend, or None to choose.

    Returns:
      `p`, in the dtype of `g`. What is left, float32, in the shape of `m`: the sum over rows, or each row's own, with 0
      for entries that are not finite. And float32, how much counts in it: the number of rows that took part, `[1]`; or
      1 for each row that did and 0 for the others, `[rows, 1]`.

    Raises:
      TypeError: A value of the wrong type or dtype.
      ValueError: A value of the wrong rank or size, or an unknown backend.
    """
    check_selection(cotangent, k, rows_per_group)
    check_memory(cotangent, memory)
    arguments = cotangent, memory, k, rows_per_group
    order = selection_order(cotangent.shape[0], rows_per_group)
    return dispatch.run("select_with_memory", OPS["select_with_memory"], backend, *arguments, order=order)


def grad_input(
    cotangent: Format,
    weight: Float[Array, ...],
    feature_axis: int,
    *,
    precision: Any = None,
    dtype: jax.typing.DTypeLike | None = None,
    backend: str | None = None,
) -> Float[Array, "rows m"]:
    """Return `dx = p wᵀ` for a compact cotangent `p`.

    Args:
      cotangent: `p`, representing `[rows, n]`: `Columns`, `Rows`, or a format with products of its own.
      weight: `[m, n]` if `feature_axis` is 1, `[n, m]` if it is 0.
      feature_axis: Where the `n` output features stand in `weight`.
      precision: As in `lax.dot_general`.
      dtype: Of the result; None for that of the sums.
      backend: Name of a backend, or None to choose.

    Returns:
      `[rows, m]`, accumulated in at least float32.

    Raises:
      TypeError: A value of the wrong type or dtype.
      ValueError: A value of the wrong rank or size, or an unknown backend.
    """
    if isinstance(cotangent, Format) and cotangent.brings_products:
        return cotangent.grad_input(weight, feature_axis, precision=precision, dtype=dtype, backend=backend)
    if isinstance(cotangent, Rows):
        check_rows(cotangent)
        check_weight(cotangent, weight, feature_axis)
        return _of_rows("grad_input", backend, cotangent, weight, feature_axis, precision, dtype)
    columns = checked_columns(cotangent)
    check_weight(columns, weight, feature_axis)
    order = products_order(layer_of(columns, weight.shape[1 - feature_axis]))
    arguments = columns, weight, feature_axis, precision, dtype
    return dispatch.run("grad_input", OPS["grad_input"], backend, *arguments, order=order)


def grad_weight(
    cotangent: Format,
    inputs: Float[Array, "rows m"],
    feature_axis: int,
    *,
    precision: Any = None,
    dtype: jax.typing.DTypeLike | None = None,
    backend: str | None = None,
) -> Float[Array, ...]:
    """Return `dw = xᵀ p` for a compact cotangent `p`.

    Args:
      cotangent: `p`, representing `[rows, n]`: `Columns`, `Rows`, or a format with products of its own.
      inputs: `x`, `[rows, m]`.
      feature_axis: Where the `n` output features stand in the result.
      precision: As in `lax.dot_general`.
      dtype: Of the result; None for that of the sums.
      backend: Name of a backend, or None to choose.

    Returns:
      `[m, n]` if `feature_axis` is 1, `[n, m]` if it is 0, accumulated in at least float32.

    Raises:
      TypeError: A value of the wrong type or dtype.
      ValueError: A value of the wrong rank or size, or an unknown backend.
    """
    if isinstance(cotangent, Format) and cotangent.brings_products:
        return cotangent.grad_weight(inputs, feature_axis, precision=precision, dtype=dtype, backend=backend)
    if isinstance(cotangent, Rows):
        check_rows(cotangent)
        check_inputs(cotangent, inputs, feature_axis)
        return _of_rows("grad_weight", backend, cotangent, inputs, feature_axis, precision, dtype)
    columns = checked_columns(cotangent)
    check_inputs(columns, inputs, feature_axis)
    order = products_order(layer_of(columns, inputs.shape[1]))
    arguments = columns, inputs, feature_axis, precision, dtype
    return dispatch.run("grad_weight", OPS["grad_weight"], backend, *arguments, order=order)


def _of_rows(op: str, backend: str | None, *args: Any) -> jax.Array:
    """Run a product of `Rows`; kept rows are plain matrices to a GPU or TPU, whose backend here is XLA."""
    known = rows.OPS[op]
    return dispatch.run(op, known, "xla" if backend in OPS[op] and backend not in known else backend, *args)


def rows_backend() -> str:
    """Return the backend of the products of `Rows`, of a dtype that it takes, on the device that the program is for."""
    return "native" if "native" in rows.OPS["grad_input"] and target.platform() == "cpu" else "xla"


def backends() -> dict[str, tuple[str, ...]]:
    """Return, for each op, the backends that this installation has.

    `native` is missing where msbp_jax was installed without a C++ compiler. A selection runs on the first that takes
    its arguments; which one runs the products of a layer is chosen by what each would take, and in `report`.

    Example:
      >>> import msbp_jax as msbp
      >>> "xla" in msbp.backends()["grad_input"]
      True
    """
    return {op: tuple(implementations) for op, implementations in OPS.items()}


def platform_names() -> frozenset[str]:
    """Return the names that JAX has for the platform that programs are for, as in `lax.platform_dependent`."""
    return target.names()
