"""A dense weight that native code makes of its entries, on a CPU, and entries that it takes of a dense matrix."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from msbp_jax.kernels.native import calls
from msbp_jax.weights import Pattern


def unpacked(values: Float[Array, " entries"], pattern: Pattern) -> Float[Array, "m n"]:
    """Return the weight as a matrix with zeros; float32 or bfloat16."""
    operands = [values, pattern.starts, pattern.inputs]
    return calls.call("unpack", operands, [(pattern.matrix_shape, values.dtype)])[0]


def packed(matrix: Float[Array, "m n"], pattern: Pattern) -> Float[Array, " entries"]:
    """Return the entries of a matrix at a pattern, 0 for its padding; float32 or bfloat16."""
    operands = [matrix, pattern.starts, pattern.inputs]
    result: jax.Array = calls.call("pack", operands, [((pattern.entries,), matrix.dtype)])[0]
    return result
