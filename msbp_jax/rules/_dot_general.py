"""`lax.dot_general` as an operation of a rule: canonical matrices by transposition."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from msbp_jax.rules._contraction import Contraction, DimensionNumbers, Side, contraction
from msbp_jax.rules._operation import AsMatrices, Dims, Examples, Matrices, Operands, Shape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DotGeneral:
    """A matrix product.

    Attributes:
      dimension_numbers: As in `lax.dot_general`.
      side: Which operand is the weight.
      precision: As in `lax.dot_general`, for the forward and all products of the backward.
      preferred_element_type: As in `lax.dot_general`.
      out_sharding: As in `lax.dot_general`.
    """

    dimension_numbers: DimensionNumbers
    side: Side
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None

    def forward(self, *operands: jax.Array) -> jax.Array:
        """Return the contraction itself."""
        lhs, rhs = operands
        return lax.dot_general(
            lhs,
            rhs,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=self.out_sharding,
        )

    def dims(self, lhs: Shape, rhs: Shape, out: Shape) -> Dims:
        """Return the canonical sizes."""
        del out
        algebra = contraction(self.dimension_numbers, lhs, rhs, self.side)
        return Dims(algebra.batch_shape, algebra.rows, algebra.examples, algebra.m, algebra.n)

    def canonical_g(self, g: jax.Array, operands: Operands) -> Float[Array, "batch rows n"]:
        """Return the gradient of the output as `[batch, rows, n]`."""
        return self._algebra(operands).canonical_g(g)

    def program_g(self, g: Float[Array, "batch rows n"], operands: Operands, out: Shape) -> jax.Array:
        """Return a canonical gradient in the shape that the program has."""
        return self._algebra(operands).program_g(g, out)

    def matrices_by(self, lhs: Shape, rhs: Shape, backend: str | None) -> Matrices:
        """Return that it is a product of matrices."""
        del lhs, rhs, backend
        return Matrices.DIRECTLY

    def as_matrices(self, operands: Operands, out: Shape) -> AsMatrices:
        """Return its operands with their axes put together."""
        del out
        algebra = self._algebra(operands)
        lhs, rhs = operands
        x, w = (rhs, lhs) if self.side == "lhs" else (lhs, rhs)

        def give_back(dx: jax.Array, dw: jax.Array) -> tuple[jax.Array, jax.Array]:
            dx, dw = algebra.program_x(dx), algebra.program_w(dw)
            return (dw, dx) if self.side == "lhs" else (dx, dw)

        return AsMatrices(
            algebra.canonical_x(x), algebra.canonical_w(w), algebra.feature_axis, self.precision, give_back
        )

    def examples(self, lhs: Shape, rhs: Shape, dtype: Any, backend: str | None) -> Examples | None:
        """Return None: the kernels leave out rows."""
        del lhs, rhs, dtype, backend
        return None

    @property
    def narrows(self) -> bool:
        """False: products of matrices are better at few features."""
        return False

    @property
    def feature_axis(self) -> int:
        """Never asked."""
        raise NotImplementedError

    def _algebra(self, operands: Operands) -> Contraction:
        lhs, rhs = operands
        return contraction(self.dimension_numbers, lhs.shape, rhs.shape, self.side)
