"""From a compact cotangent to the gradients of a contraction: which path is taken, and the paths.

| path | the operation | the cotangent |
|---|---|---|
| rows | is a product of matrices | has products |
| narrow | becomes smaller with fewer output features | is 0 outside a few columns, the same for all rows |
| patches | becomes a product of matrices on patches of its input | has products, also on patches |
| examples | can leave out examples | leaves out rows, or is all of it, for native code |
| dense | | |

The first whose line holds is taken; rule and report read the same table. On the path of rows, a cotangent that knows
only when it is run how much it keeps has plain JAX's products where that is too much. A backend that is asked for by
name runs wherever there are matrices; "dense" is one of the kernels' where the operation is a product of matrices
itself, and else the last path.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msbp_jax import kernels
from msbp_jax.formats import Dense, Format, Rows
from msbp_jax.rules._operation import Dims, Examples, Matrices, Operands, Operation, Shape


class Path(enum.Enum):
    """How the products of a site are made."""

    ROWS = "rows"
    NARROW = "narrow"
    PATCHES = "patches"
    EXAMPLES = "examples"
    DENSE = "dense"


def path_of(p: Format, operation: Operation, lhs: Shape, rhs: Shape, backend: str | None) -> Path:
    """Return the path that the products take.

    Args:
      p: The cotangent; the shapes of its leaves are enough.
      operation: The contraction.
      lhs: Shape of the left operand.
      rhs: Shape of the right operand.
      backend: Backend that is asked for; None to choose.
    """
    matrices = operation.matrices_by(lhs, rhs, backend)
    table = {
        Path.ROWS: matrices is Matrices.DIRECTLY and p.has_products and not (backend == "dense" and p.brings_products),
        Path.NARROW: operation.narrows and p.columns_are_shared and backend in (None, "xla"),
        Path.PATCHES: matrices is Matrices.BY_PATCHES and p.has_products and p.pays_on_patches and backend != "dense",
        Path.EXAMPLES: examples_of(p, operation, lhs, rhs, backend) is not None,
        Path.DENSE: True,
    }
    return next(path for path, holds in table.items() if holds)


def products(
    operation: Operation,
    operands: Operands,
    p: Format,
    dims: Dims,
    out: Shape,
    backend: str | None,
    assumed: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the first two operands.

    Args:
      operation: The contraction.
      operands: Its operands.
      p: The cotangent, its leaves with a leading axis `[batch]` if the contraction has batch axes.
      dims: Canonical sizes.
      out: Shape of the result.
      backend: Backend that is asked for; None to choose.
      assumed: What is kept where only the run tells, for an estimate of what it takes; None to wait for the run.
    """
    lhs, rhs = operands[0].shape, operands[1].shape
    match path_of(p, operation, lhs, rhs, backend):
        case Path.ROWS if backend is None and (share := _share_when_run(p, dims)) is not None:
            return _unless_dense_pays(share if assumed is None else assumed, operation, operands, p, dims, out)
        case Path.ROWS | Path.PATCHES:
            return _by_matrices(operation, operands, p, dims, out, backend)
        case Path.NARROW:
            return _narrow(operation, operands, p, out)
        case Path.EXAMPLES:
            return _on_examples(operation, operands, p, dims, out, backend)
        case Path.DENSE:
            return _on_matrix(operation, operands, p, dims, out)


def examples_of(p: Format, operation: Operation, lhs: Shape, rhs: Shape, backend: str | None) -> Examples | None:
    """Return how examples are left out, if what is kept are rows; or how native code has all of them.

    Args:
      p: As in `path_of`, as all below.
      operation: The contraction.
      lhs: Shape of the left operand.
      rhs: Shape of the right operand.
      backend: Backend that is asked for; None to choose.
    """
    if isinstance(p, Dense):
        how = operation.examples(lhs, rhs, p.values.dtype, backend) if p.native else None
        return None if how is None or how.products is None else how
    if not isinstance(p, Rows) or not kernels.skips(p):
        return None
    how = operation.examples(lhs, rhs, p.values.dtype, backend)
    if how is None or p.drawn_together is None:
        return how
    # An example is computed if any of its rows is kept: nearly all are, where rows are drawn one by one.
    rows, examples = p.values.shape[-2], lhs[how.axis]
    return how if p.drawn_together % max(1, rows // max(1, examples)) == 0 else None


def _on_examples(
    operation: Operation, operands: Operands, p: Format, dims: Dims, out: Shape, backend: str | None
) -> tuple[jax.Array, jax.Array]:
    """Return the products of the examples that have a row which is kept: XLA's take the next of a few sizes."""
    how = examples_of(p, operation, operands[0].shape, operands[1].shape, backend)
    assert how is not None
    rows = p.kept_rows() if isinstance(p, Rows) else jnp.ones(dims.rows, bool)
    kept = rows.reshape(dims.examples, -1).any(axis=1)
    g = operation.program_g(p.materialize()[None], operands, out)
    if how.products is not None:
        return how.products(operands, g, kept.astype(jnp.float32))
    dx, dw = (_climbed(of, how, operation, operands, g, kept) for of in range(2))
    return dx, dw


def _climbed(
    of: int, how: Examples, operation: Operation, operands: Operands, g: jax.Array, kept: Bool[Array, " examples"]
) -> jax.Array:
    """Return one of the gradients from the kept examples, as the next of a few sizes; each device's from its own."""
    result = operands[of]
    g_axis = how.axes[2].split().index(examples := how.axes[0].split()[how.axis])

    def local(g: jax.Array, kept: jax.Array, x: jax.Array, w: jax.Array, *others: jax.Array) -> tuple[jax.Array]:
        rest = how.rest(others, kept)
        # Of a matrix of numbers alone: where each example stands. What is kept of g is taken where it lies.
        numbers = Rows(jnp.zeros((kept.shape[0], 0), g.dtype), kept.astype(jnp.float32), unchanged=True)
        take = lambda array, at, axis: jnp.take(array, at, axis=axis, mode="clip")

        def pulled(x: jax.Array, g: jax.Array, rest: Operands) -> jax.Array:
            y, pull_back = jax.vjp(lambda x, w: operation.forward(x, w, *rest), x, w)
            found: jax.Array = pull_back(g.astype(y.dtype))[of]
            return found

        def product(at: jax.Array, _: jax.Array) -> jax.Array:
            found = pulled(take(x, at, how.axis), take(g, at, g_axis), rest)
            if of == 1:
                return found
            place: tuple[Any, ...] = (*(slice(None),) * how.axis, at)
            return jnp.zeros_like(x).at[place].set(found, mode="promise_in_bounds", unique_indices=True)

        return (kernels.climb(numbers, product, lambda: pulled(x, g, others)),)

    x, w, *others = operands
    axes_of_x, axes_of_w, axes_of_g = how.axes
    counts = "".join(f", E{number}" for number in range(len(others)))
    rule = f"{axes_of_g}, {examples}, {axes_of_x}, {axes_of_w}{counts} -> {how.axes[of]}"
    (found,) = kernels.by_axes(rule, [(result.shape, result.dtype)], lambda _: local, (g, kept, x, w, *others))
    return found


def dense_products(operation: Operation, operands: Operands, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the first two operands as plain JAX computes them."""
    forward = lambda lhs, rhs: operation.forward(lhs, rhs, *operands[2:])
    y, pull_back = jax.vjp(forward, *operands[:2])
    dlhs, drhs = pull_back(g.astype(y.dtype))
    return dlhs, drhs


def _on_matrix(
    operation: Operation, operands: Operands, p: Format, dims: Dims, out: Shape
) -> tuple[jax.Array, jax.Array]:
    """Return the dense products of the matrix that a cotangent stands for; a factor of all of it comes after them."""
    if dims.batch_shape:
        values, factor = jax.vmap(lambda p: p.materialize())(p), None
    else:
        matrix, factor = p.factored()
        values = matrix[None]
    found = dense_products(operation, operands, operation.program_g(values, operands, out))
    if factor is None:
        return found
    dlhs, drhs = ((d.astype(factor.dtype) * factor).astype(d.dtype) for d in found)
    return dlhs, drhs


def _share_when_run(p: Format, dims: Dims) -> Float[Array, ""] | None:
    """Return the largest share that any of a batch of products takes of the dense ones, if only the run tells."""
    if not dims.batch_shape:
        return p.share_when_run()
    shares = jax.vmap(lambda p: p.share_when_run())(p)
    return None if shares is None else shares.max()


def _unless_dense_pays(
    share: Float[Array, ""] | float, operation: Operation, operands: Operands, p: Format, dims: Dims, out: Shape
) -> tuple[jax.Array, jax.Array]:
    """Return the products of the canonical matrices or, where too much is kept for them to pay, plain JAX's."""
    below = kernels.pays_below(p)
    dense = lambda: _on_matrix(operation, operands, p, dims, out)
    if below == 0 or (isinstance(share, float) and share > below):
        return dense()
    if isinstance(share, float):
        return _by_matrices(operation, operands, p, dims, out, None)
    dense_pays = kernels.largest_of_members(share) > below
    compact = lambda: _by_matrices(operation, operands, p, dims, out, None)
    # Each by itself, so that one that nobody needs is not computed.
    dlhs = jax.lax.cond(dense_pays, lambda: dense()[0], lambda: compact()[0])
    drhs = jax.lax.cond(dense_pays, lambda: dense()[1], lambda: compact()[1])
    return dlhs, drhs


def _by_matrices(
    operation: Operation, operands: Operands, p: Format, dims: Dims, out: Shape, backend: str | None
) -> tuple[jax.Array, jax.Array]:
    """Return the products of the canonical matrices, by the kernels or the cotangent's own."""
    matrices = operation.as_matrices(operands, out)
    axis, options = matrices.feature_axis, {"precision": matrices.precision, "backend": backend}

    def products(x: jax.Array, w: jax.Array, p: Format) -> tuple[jax.Array, jax.Array]:
        dx = kernels.grad_input(p, w, axis, dtype=x.dtype, **options)
        return dx, kernels.grad_weight(p, x, axis, dtype=w.dtype, **options)

    if dims.batch_shape:
        return matrices.give_back(*jax.vmap(products)(matrices.x, matrices.w, p))
    dx, dw = products(matrices.x[0], matrices.w[0], p)
    return matrices.give_back(dx[None], dw[None])


def _narrow(operation: Operation, operands: Operands, p: Format, out: Shape) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the contraction with the kept output features alone; one scatter puts dw in its place."""
    x, w, *others = operands
    axis = operation.feature_axis
    index, values = p.shared_columns(w.dtype)
    kept = jnp.take(w, index, axis=axis, mode="clip", unique_indices=True)
    _, pull_back = jax.vjp(lambda x, w: operation.forward(x, w, *others), x, kept)
    dx, dw = pull_back(operation.program_g(values[None], operands, out))
    at: tuple[Any, ...] = (*(slice(None),) * axis, index)
    return dx, jnp.zeros(w.shape, dw.dtype).at[at].set(dw, mode="promise_in_bounds", unique_indices=True)
