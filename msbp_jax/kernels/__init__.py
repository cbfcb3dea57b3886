"""The ops of a sparse backward.

select              the k best columns of each group of rows, and their entries    u -> p
select_with_memory  the same of u = g + m, and what is left of u                   g, m -> p, left, rows
grad_input          dx = p wᵀ                                                      p, w -> dx
grad_weight         dw = xᵀ p                                                      x, p -> dw

A folder for each layout of what is kept (`columns`, `rows`, `entries`), in it a folder an op and a file a backend;
beside them a room for what belongs to one compiler (`native`, `pallas`, `xla`), to calls that it cannot look into
(`opaque`), and to choosing a backend (`choice`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from msbp_jax.formats import Columns, Entries, Format, Rows
from msbp_jax.kernels import entries, rows
from msbp_jax.kernels.choice import dispatch, target
from msbp_jax.kernels.choice.layer import layer_of
from msbp_jax.kernels.choice.order import products_order, selection_order
from msbp_jax.kernels.choice.patches import patches_pay as patches_pay
from msbp_jax.kernels.choice.skipping import pays_below as pays_below
from msbp_jax.kernels.choice.skipping import skips as skips
from msbp_jax.kernels.choice.skipping import skips_natively as skips_natively
from msbp_jax.kernels.columns import OPS as OPS
from msbp_jax.kernels.columns.arguments import (
    check_inputs,
    check_memory,
    check_selection,
    check_weight,
    checked_columns,
)
from msbp_jax.kernels.entries.arguments import check_entries
from msbp_jax.kernels.entries.quantized import emulates_8_bits as emulates_8_bits
from msbp_jax.kernels.native.calls import NOT_BUILT as NOT_BUILT
from msbp_jax.kernels.opaque.axes import by_axes as by_axes
from msbp_jax.kernels.rows import climb as climb
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
      cotangent: `p`, representing `[rows, n]`: `Columns`, `Rows`, `Entries`, or a format with products of its own.
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
    if isinstance(cotangent, Rows | Entries):
        _check_matrix(cotangent)
        check_weight(cotangent, weight, feature_axis)
        return _of_matrix("grad_input", backend, cotangent, weight, feature_axis, precision, dtype)
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
      cotangent: `p`, representing `[rows, n]`: `Columns`, `Rows`, `Entries`, or a format with products of its own.
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
    if isinstance(cotangent, Rows | Entries):
        _check_matrix(cotangent)
        check_inputs(cotangent, inputs, feature_axis)
        return _of_matrix("grad_weight", backend, cotangent, inputs, feature_axis, precision, dtype)
    columns = checked_columns(cotangent)
    check_inputs(columns, inputs, feature_axis)
    order = products_order(layer_of(columns, inputs.shape[1]))
    arguments = columns, inputs, feature_axis, precision, dtype
    return dispatch.run("grad_weight", OPS["grad_weight"], backend, *arguments, order=order)


def _check_matrix(cotangent: Rows | Entries) -> None:
    if isinstance(cotangent, Rows):
        check_rows(cotangent)
    else:
        check_entries(cotangent)


def _of_matrix(op: str, backend: str | None, cotangent: Rows | Entries, *args: Any) -> jax.Array:
    """Run a product of a cotangent that comes as a matrix; XLA serves on a GPU or TPU, and everywhere in 8 bits."""
    known = (rows if isinstance(cotangent, Rows) else entries).OPS[op]
    in_8_bits = isinstance(cotangent, Entries) and cotangent.bits is not None
    if in_8_bits or (backend in OPS[op] and backend not in known):
        backend = "xla"
    # A share that only the run tells is looked at by who calls this.
    whole = isinstance(cotangent, Entries) and cotangent.kept_share() is not None and not skips(cotangent)
    return dispatch.run(op, known, backend, cotangent, *args, order=("xla",) if whole else None)


def dither(
    cotangent: Float[Array, "rows n"],
    key: UInt32[Array, " 2"],
    step: Float[Array, ""],
    *,
    prunes: bool = False,
    backend: str | None = None,
) -> tuple[Float[Array, "rows n"], Float[Array, " rows"]]:
    """Make entries 0 by chance, without bias, with noise that is a function of the key, the row and the column.

        dithered    step floor(g / step + v)                                        v uniform in (0, 1)
        pruned      g if |g| >= step,   else step sign(g) if v < |g| / step,   else 0

    Args:
      cotangent: `g`, any floating dtype.
      key: Two words.
      step: 0 leaves everything as it is.
      prunes: Which of the two.
      backend: "native" or "xla"; None to choose.

    Returns:
      In the dtype of `g`: the multiples, or in a dtype of 16 bits the whole levels, which are exact there up to 256
      (bfloat16) or 2048; or pruned entries. And how many of each row are not 0, float32.
    """
    numbers = jnp.arange(cotangent.shape[0], dtype=jnp.uint32)
    return dispatch.run("dither", entries.OPS["dither"], backend, cotangent, numbers, key, step, prunes)


def spread(cotangent: Float[Array, "rows n"], *, backend: str | None = None) -> Float[Array, ""]:
    """Return the standard deviation of the finite entries of rows that are not exactly 0; 0 if all are equal.

    Args:
      cotangent: Any floating dtype.
      backend: "native" or "xla"; None to choose.
    """
    count, mean, norm = dispatch.run("row_moments", entries.OPS["row_moments"], backend, cotangent).T
    some = count > 0
    # Means are taken relative to the first of them, so that equal ones have that for a mean, to the bit.
    off = jnp.where(some, mean - mean[jnp.argmax(some)], 0)
    total = jnp.maximum(count.sum(), 1)
    between = jnp.sqrt(count) * jnp.where(some, off - (count * off).sum() / total, 0)
    norms = jnp.concatenate([jnp.where(some, norm, 0), between])
    size = jnp.max(jnp.abs(norms), initial=0)
    return size * jnp.linalg.norm(norms / jnp.where(size > 0, size, 1)) / jnp.sqrt(total)


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
