r"""`Columns`: a few columns of the cotangent for each group of rows.

Rows are cut into `G` consecutive groups of `r`; all rows of a group share the `k` columns that are kept. So one format
covers every granularity: `r = 1` is a choice for each example, `G = 1` one choice for the whole batch. If `r` does not
divide `rows`, the last group is padded with rows of zeros.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from msbp_jax.formats._format import Format, SharedColumns
from msbp_jax.formats._groups import Size, finite, group_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns(Format):
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

    def left_of(self, u: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
        """Return `u - p`."""
        dropped = jnp.repeat(~self.kept_columns(), self.rows_per_group, axis=0)[: u.shape[0]]
        left = jnp.where(dropped, u, jnp.zeros((), u.dtype))
        if not self.unchanged:
            rows = jnp.arange(u.shape[0])[:, None]
            index = jnp.repeat(self.index, self.rows_per_group, axis=0)[: u.shape[0]]
            kept = self._left_of_kept(u).reshape(-1, self.kept_per_group)[: u.shape[0]]
            left = left.at[rows, index].set(kept)
        return left

    def sum_left_of(self, u: Float[Array, "rows n"], live: Bool[Array, "rows 1"]) -> Float[Array, " n"]:
        """Return the sum of `u - p` over rows in one pass over `u`, without a dense copy of either."""
        del live  # the other rows of `u` are 0, and so is what is kept of them
        dropped = ~self.kept_columns()
        grouped = group_rows(u, self.rows_per_group)
        total = jnp.where(dropped[:, None, :], finite(grouped), jnp.zeros((), u.dtype)).sum(axis=(0, 1))
        if not self.unchanged:
            total = total.at[self.index.reshape(-1)].add(self._left_of_kept(u).sum(axis=1).reshape(-1))
        return total

    def _left_of_kept(self, u: Float[Array, "rows n"]) -> Float[Array, "G r k"]:
        """Return `u - p` at the entries that are kept and altered."""
        grouped = group_rows(u, self.rows_per_group)
        before = jnp.take_along_axis(grouped, self.index[:, None, :], axis=2, mode="promise_in_bounds")
        return finite(before - self.dequantized(before.dtype).values)

    def entries(self) -> Float[Array, ""]:
        """Return how many entries it propagates that are not 0."""
        return jnp.sum(self.values != 0, dtype=jnp.float32)

    def joined(self, shape: tuple[Size, int]) -> Columns:
        """Return the columns of blocks of whole groups, with as many groups as all blocks have.

        Raises:
          ValueError: A group would have to be cut at the end of a block.
        """
        rows = shape[0] // self.values.shape[0]
        if self.values.shape[1] * self.rows_per_group != rows:
            raise ValueError(
                f'reduce="local" needs blocks of whole groups: {self.rows_per_group} rows share a choice, and a block '
                f"has {rows} rows. Choose rows_per_group so that it divides them, or None."
            )
        return dataclasses.replace(
            self,
            values=self.values.reshape(-1, *self.values.shape[2:]),
            index=self.index.reshape(-1, self.kept_per_group),
            scale=None if self.scale is None else self.scale.reshape(-1),
            shape=shape,
        )

    @property
    def columns_are_shared(self) -> bool:
        """Whether one choice is made for all rows."""
        return self.index.shape[0] == 1

    def shared_columns(self, dtype: jax.typing.DTypeLike) -> SharedColumns:
        """Return the kept columns of the one choice."""
        return SharedColumns(self.index[0], self.dequantized(dtype).values[0, : self.shape[0]])

    @property
    def has_products(self) -> bool:
        """True: `msbp_jax.kernels` has them."""
        return True

    def kept_share(self) -> float:
        """Return `k / n`."""
        return self.kept_per_group / self.shape[1]

    def describe(self) -> str:
        """Return "k of n"."""
        return f"{self.kept_per_group} of {self.shape[1]}"

    def faults(self, u: jax.Array, *, exact: bool) -> list[str]:
        """Say what is wrong with it as what was kept of `u`."""
        index = np.asarray(self.index)
        groups = -(-u.shape[0] // self.rows_per_group)
        found = {
            f"there are {index.shape[0]} groups, expected {groups}": index.shape[0] != groups,
            f"the index is {index.dtype}, expected int32": index.dtype != np.int32,
            "an index is out of range": index.min() < 0 or index.max() >= u.shape[1],
            "a column is named twice within a group": any(len(set(row)) != len(row) for row in index),
            f"its values are {self.values.dtype}, expected {u.dtype}": self.scale is None
            and self.values.dtype != u.dtype,
        }
        faults = [fault for fault, is_so in found.items() if is_so]
        if not faults and exact and self.unchanged:
            kept = np.repeat(np.asarray(self.kept_columns()), self.rows_per_group, axis=0)[: u.shape[0]]
            same = np.array_equal(self.materialize(), np.where(kept, np.asarray(u), 0), equal_nan=True)
            faults += [] if same else ["values are marked unchanged, but differ from the gradient's"]
        return faults


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
