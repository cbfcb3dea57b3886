"""What a rule asks of a contraction, whatever its kind: its forward, its sizes, and what it can be turned into."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float

from msbp_jax import _compat
from msbp_jax.formats import Size

type Shape = tuple[Size, ...]
type Operands = tuple[jax.Array, ...]


class Dims(NamedTuple):
    """Sizes of a contraction in its canonical form, `y[rows, n] = x[rows, m] w[m, n]` for each batch element.

    Attributes:
      batch_shape: Sizes of the axes along which both operands differ (an ensemble, experts); `()` for none.
      rows: Product of all axes of y that come from x.
      examples: Size of the first of them; each example has `rows / examples` consecutive rows.
      m: Entries of x that make one entry of y.
      n: Output features.
    """

    batch_shape: Shape
    rows: Size
    examples: Size
    m: int
    n: int

    @property
    def batch(self) -> int:
        """Number of independent products."""
        size = 1
        for axis in self.batch_shape:
            size *= axis
        return size

    @property
    def rows_per_example(self) -> int:
        """Rows that the output has for each entry of its leading axis."""
        return self.rows // (self.examples if _compat.is_symbolic(self.examples) else max(1, self.examples))


@runtime_checkable
class Operation(Protocol):
    """A contraction of a parameter with data; hashable, since rules are static."""

    def forward(self, *operands: jax.Array) -> jax.Array:
        """Return the contraction itself."""
        ...

    def dims(self, lhs: Shape, rhs: Shape, out: Shape) -> Dims:
        """Return the canonical sizes for operands and a result of these shapes."""
        ...

    def canonical_g(self, g: jax.Array, operands: Operands) -> Float[Array, "batch rows n"]:
        """Return the gradient of the output as `[batch, rows, n]`."""
        ...

    def program_g(self, g: Float[Array, "batch rows n"], operands: Operands, out: Shape) -> jax.Array:
        """Return a canonical gradient in the shape `out` that the program has."""
        ...

    def matrices_by(self, lhs: Shape, rhs: Shape, backend: str | None) -> Matrices:
        """Say how it becomes a product of matrices, for operands of these shapes and a backend of the products."""
        ...

    def as_matrices(self, operands: Operands, out: Shape) -> AsMatrices:
        """Return it as a product of matrices; asked only where `matrices_by` gives a way."""
        ...

    def examples(self, lhs: Shape, rhs: Shape, dtype: Any, backend: str | None) -> Examples | None:
        """Say how it leaves out whole examples; None where all of it has to run, or where its rows are left out.

        Args:
          lhs: Shape of the left operand.
          rhs: Shape of the right operand.
          dtype: Of the cotangent.
          backend: Backend that is asked for; None to choose.
        """
        ...

    @property
    def narrows(self) -> bool:
        """Whether fewer output features make a smaller contraction of the same kind."""
        ...

    @property
    def feature_axis(self) -> int:
        """The weight's axis of output features; asked only where it is no product of matrices as it stands."""
        ...


class Matrices(enum.Enum):
    """How an operation becomes a product of matrices."""

    DIRECTLY = "directly"
    BY_PATCHES = "by patches"
    BY_ENTRIES = "by entries"  # of a weight that is sparse
    NOT = "not"


class Examples(NamedTuple):
    """How an operation, whose left operand has the examples, leaves some of them out.

    Attributes:
      backend: "native" or "xla".
      axis: Of the examples, in the left operand.
      axes: Of the left operand, the right one, and the result, as in `kernels.opaque.axes`; the examples' is "i", or
        "I" where a device needs all of them.
      rest: Takes the operands from the third on and which examples are kept, `[examples]`, and returns those for the
        kept ones in their order, followed by any others.
      products: In native code: takes the operands, g as the program has it and 0 for each example that is left out,
        `[examples]`, float32; returns the gradients of the first two.
    """

    backend: str
    axis: int
    axes: tuple[str, str, str]
    rest: Callable[[Operands, Bool[Array, " examples"]], Operands] = lambda rest, kept: rest
    products: Callable[[Operands, jax.Array, Float[Array, " examples"]], tuple[jax.Array, jax.Array]] | None = None


class AsMatrices(NamedTuple):
    """A contraction in its canonical form, and the way back.

    Attributes:
      x: The inputs, `[batch, rows, m]`.
      w: The weight, `[batch, m, n]` if `feature_axis` is 1, `[batch, n, m]` if it is 0.
      feature_axis: Where `n` stands in each weight.
      precision: Of the products.
      give_back: Takes the gradients of `x` and `w` and returns those of the first two operands.
    """

    x: Float[Array, "batch rows m"]
    w: Float[Array, "batch ..."]
    feature_axis: int
    precision: Any
    give_back: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
