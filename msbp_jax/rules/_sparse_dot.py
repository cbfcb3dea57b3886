"""A matrix product with a sparse weight, as an operation of a rule and by itself: dx and dw at the entries alone.

Its operands are those of the `dot_general`, with the values in place of the weight, and then the pattern.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.kernels import weights
from msbp_jax.rules._contraction import Contraction, contraction
from msbp_jax.rules._dot_general import DotGeneral
from msbp_jax.rules._operation import AsMatrices, Dims, Examples, Matrices, Operands, Shape
from msbp_jax.weights import Pattern, SparseWeight


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseDot:
    """A product of an input and a sparse weight.

    Attributes:
      dot: The same with a dense weight.
      shape: Of the dense weight.
      turned: Whether the weight's features are contracted, and not its inputs.
      exchanged: Whether the weight stands there with its inputs and features exchanged.
      structure: Of the pattern, whose arrays are the operands from the third on.
      backend: "native" or "xla"; None to choose.
    """

    dot: DotGeneral
    shape: Shape
    turned: bool
    exchanged: bool
    structure: Any
    backend: str | None = None

    def forward(self, *operands: jax.Array) -> jax.Array:
        """Return the contraction itself, on a mesh of explicit axes placed as that with a dense weight is."""
        return _compat.with_automatic_sharding(self._forward, operands, self._out(*operands[:2]))

    def _forward(self, *operands: jax.Array) -> jax.Array:
        lhs, rhs, *arrays = operands
        x, values = (rhs, lhs) if self.dot.side == "lhs" else (lhs, rhs)
        algebra = self._algebra(lhs.shape, rhs.shape)
        # Within shard_map a rule may not return a gradient that varies over devices for an operand that does not.
        (x, values, *arrays), _, _ = _compat.varying_alike([algebra.canonical_x(x)[0], values, *arrays])
        pattern = jax.tree.unflatten(self.structure, arrays)
        y = _product(self.turned, self.dot.precision, self.backend, x, values, pattern)
        out = self._out(lhs, rhs)
        return algebra.program_g(y.astype(out.dtype)[None], out.shape)

    def backend_for(self, pattern: Pattern, x: Shape, rows: Any, *dtypes: Any) -> str:
        """Return what runs it for an input of a shape."""
        del x
        return self.backend or weights.chosen(pattern, rows, *dtypes)

    def break_even(self, pattern: Pattern, rows: int) -> float:
        """Return the share of the entries up to which it is faster than with a dense weight, for so many rows."""
        del pattern
        return weights.break_even(rows)

    def dims(self, lhs: Shape, rhs: Shape, out: Shape) -> Dims:
        """Return the canonical sizes."""
        return self.dot.dims(*self._dense_shapes(lhs, rhs), out)

    def canonical_g(self, g: jax.Array, operands: Operands) -> Float[Array, "batch rows n"]:
        """Return the gradient of the output as `[batch, rows, n]`."""
        return self._algebra(operands[0].shape, operands[1].shape).canonical_g(g)

    def program_g(self, g: Float[Array, "batch rows n"], operands: Operands, out: Shape) -> jax.Array:
        """Return a canonical gradient in the shape that the program has."""
        return self._algebra(operands[0].shape, operands[1].shape).program_g(g, out)

    def matrices_by(self, lhs: Shape, rhs: Shape, backend: str | None) -> Matrices:
        """Return that its weight is a list of entries."""
        del lhs, rhs, backend
        return Matrices.BY_ENTRIES

    def as_matrices(self, operands: Operands, out: Shape) -> AsMatrices:
        """Return its operands with a dense weight, of which norms are taken."""
        lhs, rhs, *arrays = operands
        x, values = (rhs, lhs) if self.dot.side == "lhs" else (lhs, rhs)
        dense = SparseWeight(values, jax.tree.unflatten(self.structure, arrays), self.exchanged).dense()
        return self.dot.as_matrices((dense, x) if self.dot.side == "lhs" else (x, dense), out)

    def examples(self, lhs: Shape, rhs: Shape, dtype: Any, backend: str | None) -> Examples | None:
        """Return None: its products are those of the entries."""
        del lhs, rhs, dtype, backend
        return None

    @property
    def narrows(self) -> bool:
        """False: its pattern is of all features."""
        return False

    @property
    def feature_axis(self) -> int:
        """Never asked."""
        raise NotImplementedError

    def _dense_shapes(self, lhs: Shape, rhs: Shape) -> tuple[Shape, Shape]:
        return (self.shape, rhs) if self.dot.side == "lhs" else (lhs, self.shape)

    def _algebra(self, lhs: Shape, rhs: Shape) -> Contraction:
        return contraction(self.dot.dimension_numbers, *self._dense_shapes(lhs, rhs), self.dot.side)

    def _out(self, lhs: jax.Array, rhs: jax.Array) -> jax.ShapeDtypeStruct:
        both = [_compat.placed_like(a) for a in (lhs, rhs)]
        side = 0 if self.dot.side == "lhs" else 1
        both[side] = jax.ShapeDtypeStruct(self.shape, both[side].dtype)
        return jax.eval_shape(
            lambda a, b: lax.dot_general(
                a, b, self.dot.dimension_numbers, preferred_element_type=self.dot.preferred_element_type
            ),
            *both,
        )


def sparse_dot_of(dot: DotGeneral, weight: SparseWeight) -> SparseDot | None:
    """Return a product with a sparse weight; None for one that is not of its inputs or of its features as a whole.

    Args:
      dot: The product with the dense weight.
      weight: The weight.
    """
    side = 0 if dot.side == "lhs" else 1
    contracted, batch = (set(axes[side]) for axes in dot.dimension_numbers)
    first, axes = set(range(weight.leading)), set(range(weight.ndim))
    if batch or weight.values.ndim != 1 or contracted not in (first, axes - first):
        return None
    turned = weight.turned != (contracted != first)
    return SparseDot(
        dot=dot,
        shape=weight.shape,
        turned=turned,
        exchanged=weight.turned,
        structure=jax.tree.structure(weight.pattern),
        backend=weight.backend,
    )


def operands_of(dot: DotGeneral, x: Any, weight: SparseWeight) -> tuple[Any, ...]:
    """Return the operands of a `SparseDot`; of an input of which only the shape is known, too."""
    both = (weight.values, x) if dot.side == "lhs" else (x, weight.values)
    return (*both, *jax.tree.leaves(weight.pattern))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    turned: bool, precision: Any, backend: str | None, x: jax.Array, values: jax.Array, pattern: Pattern
) -> jax.Array:
    return weights.times(x, values, pattern, turned, precision=precision, backend=backend)


def _forward(
    turned: bool, precision: Any, backend: str | None, x: jax.Array, values: jax.Array, pattern: Pattern
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Pattern]]:
    return _product(turned, precision, backend, x, values, pattern), (x, values, pattern)


def _backward(
    turned: bool, precision: Any, backend: str | None, residuals: tuple[jax.Array, jax.Array, Pattern], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, values, pattern = residuals
    dx = weights.times(g, values, pattern, not turned, precision=precision, backend=backend)
    of_inputs, of_features = (g, x) if turned else (x, g)
    dw = weights.gradient(of_inputs, of_features, pattern, precision=precision, backend=backend)
    return dx.astype(x.dtype), dw.astype(values.dtype), None


_product.defvjp(_forward, _backward)
