"""A convolution as a matrix product: every position of the output is a row, its window of the input laid out flat."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msbp_jax.formats import Size

type Shape = tuple[Size, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Geometry of a convolution without groups of features, its axes in the order (batch, positions, features).

    Attributes:
      size: Of the kernel, one number a spatial axis, as all below.
      strides: Between windows.
      padding: Before and behind, negative to cut off.
      lhs_dilation: Distance of neighbours in the input (transposed convolution).
      rhs_dilation: Distance of neighbours in the window.
      positions: Of the output.
    """

    size: Shape
    strides: Shape
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Shape
    rhs_dilation: Shape
    positions: Shape

    def patches(self, x: Float[Array, ...]) -> Float[Array, "rows m"]:
        """Return the windows of `x`, `[batch, *spatial, features]`, as `[batch * positions, size * features]`."""
        if all(s == 1 for s in (*self.size, *self.strides, *self.lhs_dilation)) and not any(map(any, self.padding)):
            return x.reshape(-1, x.shape[-1])
        edges = [(lo, hi, dilation - 1) for (lo, hi), dilation in zip(self.padding, self.lhs_dilation, strict=True)]
        padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        pieces = [
            lax.slice(padded, *self._corner(padded.shape, offset))
            for offset in itertools.product(*(range(size) for size in self.size))
        ]
        rows = x.shape[0] * math.prod(self.positions)
        return jnp.concatenate(pieces, axis=-1).reshape(rows, math.prod(self.size) * x.shape[-1])

    def _corner(self, shape: Shape, offset: Shape) -> tuple[list[int], list[int], list[int]]:
        """Return start, limit and strides of what stands at `offset` in all windows."""
        start = [position * dilation for position, dilation in zip(offset, self.rhs_dilation, strict=True)]
        last = [
            first + (count - 1) * stride + 1
            for first, count, stride in zip(start, self.positions, self.strides, strict=True)
        ]
        return [0, *start, 0], [shape[0], *last, shape[-1]], [1, *self.strides, 1]
