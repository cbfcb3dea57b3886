r"""Compact cotangents: what a sparsifier returns and a kernel consumes.

A cotangent arrives as a matrix `g[rows, n]`. Rows are cut into `G` consecutive groups of `r`; all rows of a group share
the `k` columns that are kept. One format covers every granularity: `r = 1` is a choice per example, `G = 1` one
choice for the whole batch. If `r` does not divide `rows`, the last group is filled up with rows of zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from msbp_jax import _compat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """A few columns of the cotangent for each group of rows: `p[i, index[i // r, j]] = values[i // r, i % r, j]`.

    With a scale, the right side is multiplied by `scale[i // r]`: values of 8 bits stand for a whole cotangent.

    Attributes:
      values: The kept entries, `[G, r, k]`, in the dtype of the cotangent.
      index: Which column each entry stands in, `[G, k]`, int32, distinct within a group.
      shape: `(rows, n)` of the cotangent that is represented.
      unchanged: True where the values are entries of the cotangent as they were (top-k), False where they were
        altered (rescaled, rounded); it spares the memory a pass.
      scale: What the values of each group are multiplied by, `[G]`, float32; None for 1.
    """

    values: jax.Array
    index: jax.Array
    shape: tuple[Size, int] = dataclasses.field(metadata={"static": True})
    unchanged: bool = dataclasses.field(default=True, metadata={"static": True})
    scale: jax.Array | None = None

    @property
    def kept_per_group(self) -> int:
        """`k`, the number of columns kept for each group."""
        return self.values.shape[-1]

    @property
    def rows_per_group(self) -> Size:
        """`r`, the number of consecutive rows that share a choice."""
        return self.values.shape[-2]

    def kept_columns(self) -> Bool[Array, "G n"]:
        """Return a mask, True where a group keeps a column."""
        groups = jnp.arange(self.index.shape[0], dtype=self.index.dtype)[:, None]
        return jnp.zeros((self.index.shape[0], self.shape[1]), bool).at[groups, self.index].set(True)

    def materialize(self) -> Float[Array, "rows n"]:
        """Return the dense matrix with zeros where nothing was kept; for tests and for looking, not for training."""
        if self.scale is not None:
            return self.dequantized(jnp.float32).materialize()
        groups = jnp.arange(self.index.shape[0], dtype=self.index.dtype)[:, None]
        empty = jnp.zeros((self.index.shape[0], self.shape[1], self.rows_per_group), self.values.dtype)
        filled = empty.at[groups, self.index].set(jnp.swapaxes(self.values, 1, 2))
        return jnp.swapaxes(filled, 1, 2).reshape(-1, self.shape[1])[: self.shape[0]]

    def astype(self, dtype: jax.typing.DTypeLike) -> Columns:
        """Return the same columns with values of another dtype."""
        if self.scale is not None:
            return self.dequantized(dtype)
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def dequantized(self, dtype: jax.typing.DTypeLike) -> Columns:
        """Return the columns themselves if they have no scale, else values of a floating dtype that need none."""
        if self.scale is None:
            return self
        values = self.values.astype(jnp.float32) * self.scale.astype(jnp.float32)[:, None, None]
        return dataclasses.replace(self, values=values.astype(dtype), scale=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A cotangent with every entry in place: `p = values`.

    Attributes:
      values: `[rows, n]`, in the dtype of the cotangent.
    """

    values: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, n)`."""
        rows, n = self.values.shape
        return rows, n

    def materialize(self) -> Float[Array, "rows n"]:
        """Return the matrix itself."""
        return self.values

    def astype(self, dtype: jax.typing.DTypeLike) -> Dense:
        """Return the same entries in another dtype."""
        return Dense(self.values.astype(dtype))


type Format = Columns | Dense
Size = Any  # a number of rows: an int or, in programs for jax.export, a dimension variable


def accumulation_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype that sums of such entries are made in: float64 if one of them is, else float32."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32)


def group_rows(matrix: Shaped[Array, "rows n"], rows_per_group: Size | None) -> Shaped[Array, "G r n"]:
    """Cut the rows of a matrix into consecutive groups, with rows of zeros to fill the last one.

    Args:
      matrix: `[rows, n]`.
      rows_per_group: `r`; None, or more than there are rows, gives one group.

    Returns:
      `[G, r, n]` with `G = ceil(rows / r)`; no group for no rows.
    """
    rows, n = matrix.shape
    groups, size = grouping(rows, rows_per_group)
    missing = groups * size - rows
    if missing != 0:
        matrix = jnp.pad(matrix, ((0, missing), (0, 0)))
    return matrix.reshape(groups, size, n)


def grouping(rows: Size, rows_per_group: Size | None) -> tuple[Size, Size]:
    """Return how many groups there are and of how many rows, the last one filled up.

    Args:
      rows: How many rows there are; a dimension variable of `jax.export` will do.
      rows_per_group: `r`; None, or more than there are rows, for one group.
    """
    if _compat.is_symbolic(rows):  # nobody knows whether there are so many
        return (1, rows) if rows_per_group is None else (-(-rows // rows_per_group), rows_per_group)
    size = max(1, rows if rows_per_group is None else min(rows_per_group, rows))
    return -(-rows // size), size


def take_columns(cotangent: Float[Array, "rows n"], index: Int[Array, "G k"], rows_per_group: Size | None) -> Columns:
    """Keep, for each group of rows, the columns that `index` names.

    Args:
      cotangent: `[rows, n]`.
      index: `[G, k]`, int32, distinct within a group, `G = ceil(rows / rows_per_group)`.
      rows_per_group: `r`; None for one group.

    Returns:
      The kept entries as `Columns`.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> msbp.take_columns(jnp.arange(6.0).reshape(2, 3), jnp.array([[2], [0]]), rows_per_group=1).materialize()
      Array([[0., 0., 2.],
             [3., 0., 0.]], dtype=float32)
    """
    grouped = group_rows(cotangent, rows_per_group)
    values = jnp.take_along_axis(grouped, index[:, None, :], axis=2, mode="promise_in_bounds")
    rows, n = cotangent.shape
    return Columns(values, index, (rows, n))
