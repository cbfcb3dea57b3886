"""The axes of the products: rows i, inputs m and features n; devices may split any of them (`opaque.axes`)."""

from __future__ import annotations


def grad_input_axes(feature_axis: int) -> str:
    """Return the axes of a matrix, the weights of its rows and a layer's weight, and of dx."""
    return f"i n, i, {_weight_axes(feature_axis)} -> i m"


def grad_weight_axes(feature_axis: int) -> str:
    """Return the axes of a matrix, the weights of its rows and a layer's inputs, and of dw."""
    return f"i n, i, i m -> {_weight_axes(feature_axis)}"


def _weight_axes(feature_axis: int) -> str:
    return "m n" if feature_axis == 1 else "n m"
