"""Dense products of a weight that native code makes of its entries, on a CPU, where lists do not pay."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from msbp_jax.formats import accumulation_dtype
from msbp_jax.kernels.native import calls
from msbp_jax.kernels.xla.dot import dot
from msbp_jax.weights import Pattern


def times(
    x: Float[Array, "rows inner"], values: Float[Array, " entries"], pattern: Pattern, turned: bool, precision: Any
) -> Float[Array, "rows outer"]:
    """See `msbp_jax.kernels.weights.times`."""
    numbers = (((1,), (1 if turned else 0,)), ((), ()))
    return dot(x, unpacked(values, pattern), numbers, precision, accumulation_dtype(x.dtype, values.dtype))


def gradient(
    x: Float[Array, "rows m"], g: Float[Array, "rows n"], pattern: Pattern, precision: Any
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.weights.gradient`."""
    return packed(dot(x, g, (((0,), (0,)), ((), ())), precision, accumulation_dtype(x.dtype, g.dtype)), pattern)


def unpacked(values: Float[Array, " entries"], pattern: Pattern) -> Float[Array, "m n"]:
    """Return the weight as a matrix with zeros; float32 or bfloat16."""
    operands = [values, pattern.starts, pattern.inputs]
    return calls.call("unpack", operands, [(pattern.matrix_shape, values.dtype)])[0]


def packed(dense: Float[Array, "m n"], pattern: Pattern) -> Float[Array, " entries"]:
    """Return the entries of a matrix at a pattern, 0 for its padding; float32 or bfloat16."""
    operands = [dense, pattern.starts, pattern.inputs]
    result: jax.Array = calls.call("pack", operands, [((pattern.entries,), dense.dtype)])[0]
    return result
