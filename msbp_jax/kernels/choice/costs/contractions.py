"""Units of work of XLA's matrix products and convolutions on a CPU."""

from __future__ import annotations

import math

from msbp_jax.kernels.choice.costs.equations import Equation, size_of

FEW = 16  # rows, columns or inputs, below which a product is no block of them

type Units = dict[str, tuple[int | float, ...]]


def of_dot(equation: Equation) -> Units:
    """Return a call, multiply-adds, and entries of the operands and the result; by where the contracted axes stand."""
    (lhs_axes, rhs_axes), (lhs_batch, _) = equation.params["dimension_numbers"]
    lhs, rhs = equation.avals
    batch = math.prod(lhs.shape[axis] for axis in lhs_batch)
    depth = math.prod(lhs.shape[axis] for axis in lhs_axes)
    out = size_of(equation.results[0])
    arrays = size_of(lhs) + size_of(rhs) + out
    if lhs_batch:
        return {"product, batched": (1, batch, out * depth, arrays)}
    rows, columns = size_of(lhs) // max(1, depth), size_of(rhs) // max(1, depth)
    if min(rows, columns, depth) < FEW:
        return {"product, few": (1, out * depth, arrays)}
    if max(lhs_axes) < len(lhs.shape) - 1:
        kind = "product, columns by columns"  # as the gradient of a weight
    else:
        kind = "product, rows by rows" if max(rhs_axes) == len(rhs.shape) - 1 else "product, rows by columns"
    return {kind: (1, out * depth, arrays)}


def of_ragged_dot(equation: Equation) -> Units:
    """Return the units of a product of rows with the matrix of their group, as XLA makes it: all rows with each."""
    lhs, rhs, sizes = equation.avals
    out = size_of(equation.results[0])
    adds = out * lhs.shape[-1] * sizes.shape[-1] if len(rhs.shape) == 3 else out * lhs.shape[0]
    return {"product, rows by columns": (1, adds, size_of(lhs) + size_of(rhs) + out)}


def of_convolution(equation: Equation) -> Units:
    """Return a call, multiply-adds, entries of windows, those that are no whole vectors, and those of the arrays.

    The gradient of a kernel is a convolution too, with a window as large as the image.
    """
    params, (lhs, rhs), out = equation.params, equation.avals, equation.results[0]
    numbers = params["dimension_numbers"]
    _, features_in, *spatial = numbers.rhs_spec
    window = math.prod(rhs.shape[axis] for axis in spatial)
    positions = math.prod(out.shape[axis] for axis in numbers.out_spec[2:])
    adds = size_of(out) * window * rhs.shape[features_in]
    windows = out.shape[numbers.out_spec[0]] * positions * window * rhs.shape[features_in]
    arrays = size_of(lhs) + size_of(rhs) + size_of(out)
    grouped = params["feature_group_count"] > 1 or params["batch_group_count"] > 1
    of_kernel = window > positions
    kind = "convolution"
    if grouped:
        kind += ", grouped"
    elif of_kernel:
        kind += ", kernel of one position" if positions == 1 else ", kernel"
    elif window == 1:
        kind += ", one position"
    elif math.prod(params["lhs_dilation"]) > 1:
        kind += ", dilated"
    odd = rhs.shape[features_in] % 8 != 0  # then a window is no whole number of vectors
    return {kind: (1, adds, windows, windows * odd, arrays)}
