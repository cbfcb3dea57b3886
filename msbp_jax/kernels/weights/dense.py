"""Products with a sparse weight as dense ones, of the weight with its zeros; `XLA` is the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
from jaxtyping import Array, Float

from msbp_jax.formats import accumulation_dtype
from msbp_jax.kernels.weights.unpacked import packed, unpacked
from msbp_jax.kernels.xla.dot import dot
from msbp_jax.weights import Pattern, gathered, scattered


class Dense(NamedTuple):
    """Dense products of a weight that is made each time.

    Attributes:
      make: `(values, pattern)` to the weight `[m, n]`.
      take: `(matrix, pattern)` to the entries of a matrix `[m, n]`, 0 for padding.
    """

    make: Callable[[jax.Array, Pattern], jax.Array]
    take: Callable[[jax.Array, Pattern], jax.Array]

    def times(
        self,
        x: Float[Array, "rows inner"],
        values: Float[Array, " entries"],
        pattern: Pattern,
        turned: bool,
        precision: Any,
    ) -> Float[Array, "rows outer"]:
        """See `msbp_jax.kernels.weights.times`."""
        numbers = (((1,), (1 if turned else 0,)), ((), ()))
        dtype = accumulation_dtype(x.dtype, values.dtype)
        return dot(x, self.make(values, pattern), numbers, precision, dtype)

    def gradient(
        self, x: Float[Array, "rows m"], g: Float[Array, "rows n"], pattern: Pattern, precision: Any
    ) -> Float[Array, " entries"]:
        """See `msbp_jax.kernels.weights.gradient`."""
        dtype = accumulation_dtype(x.dtype, g.dtype)
        return self.take(dot(x, g, (((0,), (0,)), ((), ())), precision, dtype), pattern)


XLA: Final = Dense(
    lambda values, pattern: scattered(pattern, values).reshape(pattern.matrix_shape),
    lambda matrix, pattern: gathered(pattern, matrix.reshape(pattern.shape)),
)
UNPACKED: Final = Dense(unpacked, packed)
