"""Holding XLA, on a CPU, to the order in which an array is to lie in memory.

XLA is free to leave a transpose in the operand's order, and on a CPU it then fuses the turned reads into whatever comes
next: a strided loop, several times slower than its own blocked transpose, and once more for every consumer (Adam has
three). Holding both sides of a transpose to row-major order makes it one blocked copy.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from msbp_jax.kernels.choice import target
from msbp_jax.kernels.opaque.export import unless_exported


def row_major(matrix: Float[Array, "a b"]) -> Float[Array, "a b"]:
    """Return the matrix, computed once and stored row by row."""
    return unless_exported(_row_by_row, matrix) if target.platform() == "cpu" else matrix


def _row_by_row(array: Any) -> Any:
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def transposed(matrix: Float[Array, "a b"]) -> Float[Array, "b a"]:
    """Return the transpose, computed once and stored row by row."""
    return row_major(row_major(matrix).T)
