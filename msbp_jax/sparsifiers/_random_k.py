"""Random-k: features drawn at random, the yardstick that top-k has to beat, and an unbiased estimator if rescaled."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax.formats import Columns, take_columns
from msbp_jax.sparsifiers._base import (
    EXAMPLE,
    RowsPerGroup,
    Sparsifier,
    check_count,
    check_rows_per_group,
    describe,
    rows_of,
)


class RandomKState(NamedTuple):
    """State of `random_k`.

    Attributes:
      key: Typed PRNG key, split at each step.
    """

    key: jax.Array


def random_k(
    density: float | None = None,
    *,
    k: int | None = None,
    rescale: bool = False,
    rows_per_group: RowsPerGroup = 1,
    key: jax.Array | None = None,
) -> Sparsifier:
    r"""Keep `k` features of each group of rows, drawn uniformly without replacement.

        S(u)_ij = c u_ij   if feature j was drawn for the group of row i,   else 0,     c = n/k if rescale else 1.

    With `rescale` it is unbiased: `E[S(u)] = u`, with variance `(n/k - 1) u_ij^2` an entry. Without, it shrinks:
    `E[S(u)] = (k/n) u`.

    Args:
      density: Share of the features kept, in (0, 1]; `k = max(1, round(density * n))`.
      k: Number of features kept, at least 1; `k >= n` is the dense backward. Either this or `density`.
      rescale: Whether to multiply what is kept by `n/k`.
      rows_per_group: `r`, rows that share a draw; "example" for all rows of an entry of the output's leading axis; None
        for one draw for the whole batch.
      key: Typed PRNG key that the state starts from, `jax.random.key(0)` if None. Every site gets a key of its own from
        it, and every step splits it.

    Returns:
      The sparsifier. Its state is the key.

    Raises:
      ValueError: Both or neither of `density` and `k`; one of them, or `rows_per_group`, out of range.
      TypeError: A value of the wrong type, or a `key` that is not a single typed PRNG key.

    Example:
      >>> import jax, msbp_jax as msbp
      >>> msbp.random_k(density=0.1, rescale=True, key=jax.random.key(7))
      random_k(density=0.1, rows_per_group=1, rescale=True)
    """
    count = check_count("random_k", density, k)
    checked = check_rows_per_group(rows_per_group)
    group = rows_of(checked)
    if key is not None and not (isinstance(key, jax.Array) and _is_single_key(key)):
        raise TypeError(f"key must be one typed PRNG key such as jax.random.key(0), got {key!r}.")

    def init(aval: jax.ShapeDtypeStruct) -> RandomKState:
        del aval
        return RandomKState(jax.random.key(0) if key is None else key)

    def apply(u: jax.Array, state: RandomKState) -> tuple[Columns, RandomKState]:
        rows, n = u.shape
        kept = count.of(n)
        groups = -(-rows // min(group or rows, rows))
        next_key, draw = jax.random.split(state.key)
        # The k largest of n uniform numbers are a uniform draw without replacement; ties cannot bias it towards
        # either side of an index often enough to be seen (24 random bits).
        index = jax.lax.top_k(jax.random.uniform(draw, (groups, n)), kept)[1]
        columns = take_columns(u, index, group)
        if rescale:
            scaled = columns.values * jnp.asarray(n / kept, u.dtype)
            columns = dataclasses.replace(columns, values=scaled, unchanged=False)
        return columns, RandomKState(next_key)

    return Sparsifier(
        init=init,
        apply=apply,
        name=describe("random_k", count, checked)[:-1] + f", rescale={rescale})",
        is_identity=lambda aval: count.of(aval.shape[1]) >= aval.shape[1],
        per_example=None
        if checked != EXAMPLE
        else lambda rows: random_k(density, k=k, rescale=rescale, rows_per_group=rows, key=key),
    )


def _is_single_key(key: jax.Array) -> bool:
    return jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
