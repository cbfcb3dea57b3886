"""Dimension algebra of a contraction with a parameter: any `dot_general` as `y[b] = x[b] w[b]`, and back.

Lingo, here and in the rules:
    inputs, x       the operand that depends on the data, canonical form [batch, rows, m]
    weight, w       the operand that depends on parameters only, canonical form [batch, m, n] or [batch, n, m]
    g               gradient of the output, canonical form [batch, rows, n]
    side            "lhs" or "rhs": where the weight stands in the dot_general
    batch           batch dimensions of the dot_general, flattened; both operands have them (an ensemble, experts)
    rows            all free axes of x, flattened in their order
    m, n            contracted axes, and free axes of w, flattened
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats import Size

type Shape = tuple[Size, ...]
type Side = Literal["lhs", "rhs"]
type DimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contraction:
    """A `dot_general` with one operand called the weight, and the permutations that make it canonical.

    Attributes:
      x_order: Permutation of x's axes to (batch, free, contracted).
      w_order: Permutation of w's axes to (batch, contracted, free) if `feature_axis` is 1, else (batch, free,
        contracted); whichever moves no data, where there is one.
      g_order: Permutation of the output's axes to (batch, x free, w free).
      feature_axis: Where n stands in the canonical weight without its batch axis.
      x_shape: Shape of x as the program has it.
      w_shape: Shape of w as the program has it.
      batch_shape: Sizes of the batch axes.
      rows: Product of x's free axes.
      examples: Size of the first of them.
      m: Product of the contracted axes.
      n: Product of w's free axes.
    """

    x_order: tuple[int, ...]
    w_order: tuple[int, ...]
    g_order: tuple[int, ...]
    feature_axis: int
    x_shape: Shape
    w_shape: Shape
    batch_shape: Shape
    rows: Size
    examples: Size
    m: int
    n: int

    @property
    def batch(self) -> Size:
        """Number of independent products."""
        return math.prod(self.batch_shape)

    def canonical_x(self, x: Float[Array, ...]) -> Float[Array, "batch rows m"]:
        """Return x as `[batch, rows, m]`."""
        return jnp.transpose(x, self.x_order).reshape(self.batch, self.rows, self.m)

    def canonical_w(self, w: Float[Array, ...]) -> Float[Array, "batch ..."]:
        """Return w as `[batch, m, n]`, or `[batch, n, m]` if `feature_axis` is 0."""
        shape = (self.m, self.n) if self.feature_axis == 1 else (self.n, self.m)
        return jnp.transpose(w, self.w_order).reshape(self.batch, *shape)

    def canonical_g(self, g: Float[Array, ...]) -> Float[Array, "batch rows n"]:
        """Return the output's gradient as `[batch, rows, n]`."""
        return jnp.transpose(g, self.g_order).reshape(self.batch, self.rows, self.n)

    def program_x(self, x: Float[Array, "batch rows m"]) -> Float[Array, ...]:
        """Return a canonical x in the shape that the program has."""
        return _restore(x, self.x_order, self.x_shape)

    def program_w(self, w: Float[Array, "batch ..."]) -> Float[Array, ...]:
        """Return a canonical w in the shape that the program has."""
        return _restore(w, self.w_order, self.w_shape)

    def program_g(self, g: Float[Array, "batch rows n"], shape: Shape) -> Float[Array, ...]:
        """Return a canonical gradient in the output's own `shape`."""
        return _restore(g, self.g_order, shape)


def contraction(dimension_numbers: DimensionNumbers, lhs_shape: Shape, rhs_shape: Shape, side: Side) -> Contraction:
    """Return the canonical form of a `dot_general` whose weight is on `side`.

    Args:
      dimension_numbers: `((lhs contracted, rhs contracted), (lhs batch, rhs batch))`.
      lhs_shape: Shape of the left operand.
      rhs_shape: Shape of the right operand.
      side: Which of them is the weight.
    """
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    lhs = (tuple(lhs_contracted), tuple(lhs_batch), tuple(lhs_shape))
    rhs = (tuple(rhs_contracted), tuple(rhs_batch), tuple(rhs_shape))
    (x_contracted, x_batch, x_shape), (w_contracted, w_batch, w_shape) = (rhs, lhs) if side == "lhs" else (lhs, rhs)

    # The order of the pairs of contracted axes is free: in the weight's order it need not be transposed.
    pairs = sorted(zip(w_contracted, x_contracted, strict=True))
    w_contracted = tuple(w for w, _ in pairs)
    x_contracted = tuple(x for _, x in pairs)
    x_free = _others(len(x_shape), x_contracted + x_batch)
    w_free = _others(len(w_shape), w_contracted + w_batch)
    in_out, out_in = w_batch + w_contracted + w_free, w_batch + w_free + w_contracted
    feature_axis = 0 if out_in == tuple(range(len(w_shape))) else 1

    # The output's axes are (batch, lhs free, rhs free).
    batches, first = len(w_batch), len(w_free) if side == "lhs" else len(x_free)
    rank = batches + len(x_free) + len(w_free)
    lhs_axes, rhs_axes = tuple(range(batches, batches + first)), tuple(range(batches + first, rank))
    g_order = (*range(batches), *(rhs_axes + lhs_axes if side == "lhs" else lhs_axes + rhs_axes))
    return Contraction(
        x_order=x_batch + x_free + x_contracted,
        w_order=in_out if feature_axis == 1 else out_in,
        g_order=g_order,
        feature_axis=feature_axis,
        x_shape=x_shape,
        w_shape=w_shape,
        batch_shape=tuple(w_shape[axis] for axis in w_batch),
        rows=math.prod(x_shape[axis] for axis in x_free),
        examples=x_shape[x_free[0]] if x_free else 1,
        m=math.prod(w_shape[axis] for axis in w_contracted),
        n=math.prod(w_shape[axis] for axis in w_free),
    )


def _others(rank: int, taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in taken)


def _restore(canonical: Array, order: tuple[int, ...], shape: Shape) -> Array:
    permuted = canonical.reshape(tuple(shape[axis] for axis in order))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(permuted, inverse)
