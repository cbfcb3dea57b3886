"""Random-k: features drawn at random, the yardstick that top-k has to beat, and an unbiased estimator if rescaled."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.formats import Columns, grouping, take_columns
from msbp_jax.sparsifiers._base import (
    EXAMPLE,
    Count,
    RowsPerGroup,
    Sparsifier,
    check_count,
    check_rows_per_group,
    describe,
    rows_of,
)
from msbp_jax.sparsifiers._keys import StartingKey
from msbp_jax.sparsifiers._where import Stays, Where


class RandomKState(NamedTuple):
    """State of `random_k`.

    Attributes:
      key: Typed PRNG key, split at each step.
    """

    key: jax.Array


_compat.serializable(RandomKState)


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
        it, as do stacked layers, steps of a scan, members of a vmap, devices and microbatches; every step splits it. A
        model that a loss calls twice draws twice, unless the loss does so in a loop of its own, through a function
        compiled by itself, or with an NNX model.

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
    count, group = check_count("random_k", density, k), check_rows_per_group(rows_per_group)
    return _RandomK(count, group, rescale, None if key is None else StartingKey.checked(key)).sparsifier()


@dataclasses.dataclass(frozen=True)
class _RandomK:
    count: Count
    group: RowsPerGroup
    rescale: bool
    key: StartingKey | None

    def sparsifier(self) -> Sparsifier:
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=describe("random_k", self.count, self.group)[:-1] + f", rescale={self.rescale})",
            at=self.at,
        )

    def init(self, aval: jax.ShapeDtypeStruct) -> RandomKState:
        del aval
        return RandomKState(jax.random.key(0) if self.key is None else self.key.array)

    def apply(self, u: jax.Array, state: RandomKState) -> tuple[Columns, RandomKState]:
        (rows, n), group = u.shape, rows_of(self.group)
        kept = self.count.of(n)
        groups, _ = grouping(rows, group)
        next_key, draw = jax.random.split(state.key)
        # The k largest of n uniform numbers are a uniform draw without replacement. Ties favour the lower index, but
        # among 24 random bits they are too rare for that to be seen.
        index = jax.lax.top_k(jax.random.uniform(draw, (groups, n)), kept)[1]
        columns = take_columns(u, index, group)
        if self.rescale:
            scaled = columns.values * jnp.asarray(n / kept, u.dtype)
            columns = dataclasses.replace(columns, values=scaled, unchanged=False)
        return columns, RandomKState(next_key)

    def at(self, where: Where) -> Sparsifier | Stays:
        if (stays := self.count.why_not(self.sparsifier().name, where)) is not None:
            return stays
        group = where.rows_per_example if self.group == EXAMPLE else self.group
        return dataclasses.replace(self, group=group).sparsifier()
