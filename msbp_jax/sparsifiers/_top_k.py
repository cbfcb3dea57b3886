"""Top-k: the features with the largest magnitude, chosen for each group of rows."""

from __future__ import annotations

import jax

from msbp_jax import kernels
from msbp_jax.formats import Columns
from msbp_jax.sparsifiers._base import (
    EXAMPLE,
    RowsPerGroup,
    Sparsifier,
    State,
    check_count,
    check_rows_per_group,
    describe,
    rows_of,
)


def top_k(
    density: float | None = None,
    *,
    k: int | None = None,
    rows_per_group: RowsPerGroup = 1,
    backend: str | None = None,
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
      backend: Which backend selects; None chooses.

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
    count = check_count("top_k", density, k)
    checked = check_rows_per_group(rows_per_group)
    group = rows_of(checked)

    def apply(u: jax.Array, state: State) -> tuple[Columns, State]:
        return kernels.select(u, count.of(u.shape[1]), group, backend=backend), state

    def with_memory(g: jax.Array, memory: jax.Array, decay: float, state: State) -> tuple[Columns, jax.Array, State]:
        k = count.of(g.shape[1])
        p, new_memory = kernels.select_with_memory(g, memory, decay, k, group, backend=backend)
        return p, new_memory, state

    return Sparsifier(
        init=lambda aval: (),
        apply=apply,
        name=describe("top_k", count, checked),
        is_identity=lambda aval: count.of(aval.shape[1]) >= aval.shape[1],
        with_memory=with_memory,
        per_example=None
        if checked != EXAMPLE
        else lambda rows: top_k(density, k=k, rows_per_group=rows, backend=backend),
    )
