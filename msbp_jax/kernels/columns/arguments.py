"""What the ops accept. Wrong input raises here, before tracing; what a backend cannot do it declines itself."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.formats import Columns, Format


def check_selection(cotangent: Any, k: Any, rows_per_group: Any) -> None:
    """Check the arguments of `select`.

    Raises:
      TypeError: A value of the wrong type or dtype.
      ValueError: A value of the wrong rank or size.
    """
    _check_matrix("cotangent", cotangent)
    _check_integer("k", k)
    n = cotangent.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} columns of cotangent, got {k}.")
    if rows_per_group is None:
        return
    _check_integer("rows_per_group", rows_per_group)
    if rows_per_group < 1:
        raise ValueError(f"rows_per_group must be at least 1, or None for one group, got {rows_per_group}.")


def check_memory(cotangent: Any, memory: Any) -> None:
    """Check the memory of `select_with_memory`.

    Raises:
      TypeError: It is not a floating-point array.
      ValueError: It is neither `[n]` nor `[rows, n]`.
    """
    _check_floating("memory", memory)
    if memory.shape not in (cotangent.shape, cotangent.shape[1:]):
        raise ValueError(
            f"memory must have shape {cotangent.shape[1:]} (one for all rows) or {cotangent.shape} (one for each), "
            f"got {memory.shape}."
        )


def checked_columns(cotangent: Any) -> Columns:
    """Return a compact cotangent of the format that the kernels take.

    Raises:
      TypeError: It is not `Columns` of floating-point values and integer index.
      ValueError: Its parts do not fit each other or the shape that it represents.
    """
    if not isinstance(cotangent, Columns):
        raise TypeError(f"cotangent must be msbp.Columns, such as msbp.take_columns returns, got {type(cotangent)}.")
    values, index, scale = cotangent.values, cotangent.index, cotangent.scale
    if scale is None:
        _check_floating("cotangent.values", values)
    else:
        _check_floating("cotangent.scale", scale)
        if scale.shape != index.shape[:1]:
            raise ValueError(f"cotangent.scale must be [G], {index.shape[:1]} here, got {scale.shape}.")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"cotangent.index must have an integer dtype, got {index.dtype}.")
    rows, n = cotangent.shape
    if values.ndim != 3 or index.ndim != 2 or index.shape != (values.shape[0], values.shape[2]):
        raise ValueError(
            f"cotangent.values must be [G, r, k] and cotangent.index [G, k], got {values.shape} and {index.shape}."
        )
    groups, r, k = values.shape
    if 0 in values.shape:
        raise ValueError(f"cotangent.values must not be empty, got shape {values.shape}.")
    if k > n:
        raise ValueError(f"cotangent.values keeps {k} columns of a cotangent that has {n}.")
    if not _compat.is_symbolic(groups, rows) and not (groups - 1) * r < rows <= groups * r:
        raise ValueError(f"cotangent.values has {groups} groups of {r} rows, which does not fit {rows} rows.")
    return cotangent


def check_weight(cotangent: Format, weight: Any, feature_axis: Any) -> None:
    """Check the weight of `grad_input`.

    Raises:
      TypeError: It is not a floating-point array.
      ValueError: It is not a matrix with the cotangent's features on `feature_axis`.
    """
    _check_matrix("weight", weight)
    check_axis(feature_axis)
    if weight.shape[feature_axis] != cotangent.shape[1]:
        raise ValueError(
            f"weight must have the {cotangent.shape[1]} features of the cotangent on axis {feature_axis}, "
            f"got shape {weight.shape}."
        )


def check_inputs(cotangent: Format, inputs: Any, feature_axis: Any) -> None:
    """Check the inputs of `grad_weight`.

    Raises:
      TypeError: They are not a floating-point array.
      ValueError: They are not a matrix with the cotangent's rows.
    """
    _check_matrix("inputs", inputs)
    check_axis(feature_axis)
    if inputs.shape[0] != cotangent.shape[0]:
        raise ValueError(f"inputs must have the {cotangent.shape[0]} rows of the cotangent, got shape {inputs.shape}.")


def check_axis(feature_axis: Any) -> None:
    """Check that the axis is one of a matrix.

    Raises:
      ValueError: It is neither 0 nor 1.
    """
    if feature_axis not in (0, 1):
        raise ValueError(f"feature_axis must be 0 or 1, got {feature_axis!r}.")


def _check_floating(name: str, array: Any) -> None:
    dtype = getattr(array, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {dtype or type(array)}.")


def _check_matrix(name: str, array: Any) -> None:
    _check_floating(name, array)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a matrix with at least one row and one column, got shape {array.shape}.")


def _check_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}.")
