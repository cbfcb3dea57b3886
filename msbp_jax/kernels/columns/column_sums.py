"""What a selection and the memory of a mean need of each group of rows, in one pass over the gradient."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msbp_jax.formats import finite, group_rows
from msbp_jax.kernels.residual import Remembered, add_memory


def column_sums(
    g: Float[Array, "rows n"], remembered: Remembered | None, rows_per_group: int
) -> tuple[Float[Array, "G n"], Float[Array, "G n"]]:
    """Return, for each group of rows and column of `u = g + m`, the sums of `|u|` and of the finite entries of `u`.

    XLA makes one loop over `g` of both, and `u` is never stored.
    """
    u = g.astype(jnp.float32) if remembered is None else add_memory(g, *remembered)
    grouped = group_rows(u, rows_per_group)
    return jnp.abs(grouped).sum(axis=1), finite(grouped).sum(axis=1)


def sum_left(sums: Float[Array, "G n"], index: Int[Array, "G k"]) -> Float[Array, " n"]:
    """Return the sum over rows of `u - p` where `p` keeps the columns `index` of `u` as they are."""
    groups = jnp.arange(index.shape[0], dtype=index.dtype)[:, None]
    left = sums.at[groups, index].set(0, mode="promise_in_bounds", unique_indices=True)
    return finite(left.sum(axis=0))
