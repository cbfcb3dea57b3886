"""What a rule asks of a contraction, whatever its kind: its forward, its sizes, and the products of its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msbp_jax import _compat
from msbp_jax.formats import Columns, Size

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

    def path(self, groups: Size, lhs: Shape, rhs: Shape, backend: str | None) -> str:
        """Say how `products` works on so many groups, for operands of these shapes.

        "rows": by the kernels; "patches": by the kernels, on patches; "narrow": as the same contraction with the kept
        features only; "dense": as the whole contraction, on the sparse gradient.
        """
        ...

    def products(self, operands: Operands, p: Columns, out: Shape, backend: str | None) -> tuple[jax.Array, jax.Array]:
        """Return the gradients of the first two operands for a compact cotangent `p`, its leaves batched if y is."""
        ...


def narrow_products(
    forward: Callable[..., jax.Array],
    x: Float[Array, ...],
    w: Float[Array, ...],
    axis: int,
    index: Int[Array, " k"],
    g: Float[Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """Return (dx, dw) of a contraction of which only the output features `index` have a gradient.

    Args:
      forward: `(x, w) -> y` for a weight with any number of output features.
      x: The inputs.
      w: The weight, `n` output features on `axis`.
      axis: Where they are.
      index: Which of them are kept, distinct.
      g: The gradient of the output, of these features alone.
    """
    kept = jnp.take(w, index, axis=axis, mode="clip", unique_indices=True)
    dx, dw = jax.vjp(forward, x, kept)[1](g)
    at: tuple[Any, ...] = (*(slice(None),) * axis, index)
    return dx, jnp.zeros(w.shape, dw.dtype).at[at].set(dw, mode="promise_in_bounds", unique_indices=True)


def dense_products(operation: Operation, operands: Operands, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the first two operands as plain JAX computes them."""
    dlhs, drhs = jax.vjp(lambda lhs, rhs: operation.forward(lhs, rhs, *operands[2:]), *operands[:2])[1](g)
    return dlhs, drhs
