"""Top-k: the features with the largest magnitude, chosen for each group of rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from msbp_jax import kernels
from msbp_jax.formats import Columns, take_columns
from msbp_jax.sparsifiers._base import (
    EXAMPLE,
    Count,
    RowsPerGroup,
    Sparsifier,
    State,
    check_count,
    check_rows_per_group,
    describe,
    rows_of,
)
from msbp_jax.sparsifiers._where import Stays, Where


def top_k(
    density: float | None = None,
    *,
    k: int | None = None,
    rows_per_group: RowsPerGroup = 1,
) -> Sparsifier:
    r"""Keep the `k` most important features of each group of rows.

    Rows are cut into consecutive groups of `r`. With `s_j = sum_{i in group} |u_ij|`,

        S(u)_ij = u_ij   if s_j is among the k largest scores of the group of row i,   else 0.

    It is biased; `||S(u)||_1 >= (k/n) ||u||_1` in each group. Small groups follow each example; large groups turn the
    backward into small dense products, which is where the speed is.

    Args:
      density: Share of the features kept, in (0, 1]; `k = max(1, round(density * n))`.
      k: Number of features kept, at least 1; `k >= n` is the dense backward, bit for bit. Either this or `density`.
      rows_per_group: `r`, rows that share a choice. 1: each example for itself (MSBP; meProp "simple"). None: one
        choice for the whole batch (meProp "unified"; for a convolution, ssProp). "example": one choice for all rows of
        an entry of the output's leading axis (positions of an image, time steps). The last group may be shorter.

    Returns:
      The sparsifier. It has no state. Ties go to the lower index. NaN scores highest, so a NaN is propagated.

    Raises:
      ValueError: Both or neither of `density` and `k`; one of them, or `rows_per_group`, out of range.
      TypeError: A value of the wrong type.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.top_k(density=0.04, rows_per_group=32)
      top_k(density=0.04, rows_per_group=32)

    References:
      Sun et al., meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced Overfitting, 2017
      (arXiv 1706.06197). Zhang et al., Memorized Sparse Backpropagation, 2019 (arXiv 1905.10194).
    """
    return _TopK(check_count("top_k", density, k), check_rows_per_group(rows_per_group)).sparsifier()


@dataclasses.dataclass(frozen=True)
class _TopK:
    count: Count
    group: RowsPerGroup
    backend: str | None = None  # what `sparse_vjp` was asked for

    def sparsifier(self) -> Sparsifier:
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=describe("top_k", self.count, self.group),
            at=self.at,
            with_memory=self.with_memory,
        )

    def init(self, aval: jax.ShapeDtypeStruct) -> State:
        del aval
        return ()

    def apply(self, u: jax.Array, state: State) -> tuple[Columns, State]:
        k, group = self.count.of(u.shape[1]), rows_of(self.group)
        if u.shape[0] == 0:
            return take_columns(u, jnp.zeros((0, k), jnp.int32), group), state
        return kernels.select(u, k, group, backend=self.backend), state

    def with_memory(self, g: jax.Array, memory: jax.Array) -> tuple[Columns, jax.Array, jax.Array]:
        k, group = self.count.of(g.shape[1]), rows_of(self.group)
        return kernels.select_with_memory(g, memory, k, group, backend=self.backend)

    def at(self, where: Where) -> Sparsifier | Stays:
        if (stays := self.count.why_not(self.sparsifier().name, where)) is not None:
            return stays
        group = where.rows_per_example if self.group == EXAMPLE else self.group
        backend = where.backend if where.backend in kernels.backends()["select"] else None
        return dataclasses.replace(self, group=group, backend=backend).sparsifier()
