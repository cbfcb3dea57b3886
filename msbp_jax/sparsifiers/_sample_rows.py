"""Sampled rows: an unbiased backward on the examples, or tokens, whose gradient matters."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax import _checks, _compat
from msbp_jax.formats import Rows, grouping
from msbp_jax.kernels.opaque.axes import by_axes
from msbp_jax.kernels.residual import takes_part
from msbp_jax.sparsifiers._base import EXAMPLE, RowsPerGroup, Sparsifier, check_rows_per_group
from msbp_jax.sparsifiers._draw import draw
from msbp_jax.sparsifiers._keys import StartingKey
from msbp_jax.sparsifiers._running import running
from msbp_jax.sparsifiers._where import Where


class SampledRowsState(NamedTuple):
    """State of `sample_rows`.

    Attributes:
      key: Typed PRNG key, split at each step.
      efficiency: Running mean of the relative efficiency e of the draws, float32, `[]`.
      density: Running mean of the share of the rows that was kept.
      kept: Running mean of their number.
      steps: How many steps the site has seen.
    """

    key: jax.Array
    efficiency: jax.Array
    density: jax.Array
    kept: jax.Array
    steps: jax.Array

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """Running means of the efficiency, the density and the number of rows, over some ten steps."""
        told = {"efficiency": self.efficiency, "density": self.density, "count": self.kept}
        return {name: jnp.mean(mean) for name, mean in told.items()}


_compat.serializable(SampledRowsState)

_IDLE = -1  # the score of a row that takes no part


def sample_rows(
    *,
    efficiency: float | None = None,
    density: float | None = None,
    count: int | None = None,
    rows_per_group: RowsPerGroup = 1,
    scores: Literal["norm", "product"] = "norm",
    key: jax.Array | None = None,
) -> Sparsifier:
    r"""Keep a few rows of the gradient, drawn by their norm, and weigh them up: unbiased.

    With `s_i` the norm of row i of g, and `p_i` the smallest probabilities proportional to it that are worth what is
    asked for,

        S(g)_i = g_i / p_i   with probability p_i,   else 0,       E[S(g)] = g,
        e = sum s^2 / sum (s^2 / p)                                the relative efficiency.

    The sparse gradient is worth that of a batch e times as large. Where all examples have gradients alike, nearly all
    rows are kept; as a task is learned, most gradients are nearly 0, and the backward gets cheap by itself.

    Given to `sparse_vjp` alone, `sample_rows(...)` draws once, where the gradient enters the model: it is short for
    `{"@outputs": sample_rows(...), "*": skip_zero_rows()}`. In a plan, under a pattern over sites, it draws at each.

    Args:
      efficiency: Keep the fewest rows, by their expected number, whose relative efficiency is at least this, in (0, 1].
        Exactly one of `efficiency`, `density` and `count` is given.
      density: Keep this share of the groups, in (0, 1], at least one: exactly `round(density * groups)`.
      count: Keep this number of groups.
      rows_per_group: r, consecutive rows that are kept or left out together, by the norm of all of them; the last group
        may be shorter. "example" for all rows of an entry of the output's leading axis, as networks need that mix rows
        of an example (attention).
      scores: `"norm"`: of the row of g. `"product"`: that times the norm of the row of x, which is best where only dw
        is sampled; not for `"@outputs"`, which has no x.
      key: Typed PRNG key that the state starts from, `jax.random.key(0)` if None. Every site gets a key of its own from
        it, as do stacked layers, steps of a scan, members of a vmap, devices and microbatches; every step splits it.

    Returns:
      The sparsifier. Its state has the key, and running means of e, density and count for `msbp.metrics`. Drawing is
      systematic: each row is kept with exactly its probability, and their number is the sum of these, rounded down or
      up. Rows that are exactly 0 are left out and not counted; a row that is not finite is kept, with p = 1. A tenth
      of the mean score is the floor of all scores, so that no weight is beyond a bound.

    Raises:
      ValueError: None or several of `efficiency`, `density` and `count`; one of them, or `rows_per_group` or `scores`,
        out of range; later, `count` larger than the number of groups.
      TypeError: A value of the wrong type, or a `key` that is not a single typed PRNG key.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.sample_rows(efficiency=0.95)
      sample_rows(efficiency=0.95)

    References:
      The score is that of VCAS (Wang et al., 2024, arXiv 2402.17227); the criterion is this library's.
    """
    amounts = {"efficiency": efficiency, "density": density, "count": count}
    given = {name: value for name, value in amounts.items() if value is not None}
    if len(given) != 1:
        got = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
        raise ValueError(
            f"sample_rows takes one of efficiency=, density= and count=, got {got}. Write "
            "sample_rows(efficiency=0.95) for as few rows as are worth 95 % of the batch, sample_rows(density=0.25) "
            "for a quarter of the rows, or sample_rows(count=64) for 64 of them."
        )
    if efficiency is not None:
        efficiency = _checks.fraction("efficiency", efficiency, zero=False, meaning="what the kept rows are worth")
    if density is not None:
        density = _checks.fraction("density", density, zero=False, meaning="share of the rows kept")
    if count is not None:
        count = _checks.positive_int("count", count, "groups of rows kept")
    if scores not in ("norm", "product"):
        raise ValueError(
            f'scores must be "norm" (of the row of g) or "product" (times that of the row of x), got {scores!r}.'
        )
    if rows_per_group is None:
        raise ValueError(
            "rows_per_group=None would be one group of all rows, of which there is nothing to draw. Give a number of "
            'rows, or "example".'
        )
    start = None if key is None else StartingKey.checked(key)
    group = check_rows_per_group(rows_per_group)
    return _SampleRows(efficiency, density, count, group, scores == "product", start).sparsifier()


@dataclasses.dataclass(frozen=True)
class _SampleRows:
    efficiency: float | None
    density: float | None
    count: int | None
    group: RowsPerGroup
    by_product: bool
    key: StartingKey | None

    def sparsifier(self) -> Sparsifier:
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=self.name,
            at=self.at,
            wants=("input_norms",) if self.by_product else (),
            enters=not self.by_product,
            remembers=False,
        )

    @property
    def name(self) -> str:
        amounts = {"efficiency": self.efficiency, "density": self.density, "count": self.count}
        said = [f"{name}={value:g}" for name, value in amounts.items() if value is not None]
        said += [] if self.group == 1 else [f"rows_per_group={self.group!r}".replace("'", '"')]
        said += ['scores="product"'] if self.by_product else []
        return f"sample_rows({', '.join(said)})"

    def init(self, aval: jax.ShapeDtypeStruct) -> SampledRowsState:
        self._groups_kept(aval.shape[0])
        key = jax.random.key(0) if self.key is None else self.key.array
        return SampledRowsState(key, *(jnp.zeros((), jnp.float32) for _ in range(4)))  # a buffer each, to be donated

    def apply(self, u: jax.Array, state: SampledRowsState, **seen: jax.Array) -> tuple[Rows, SampledRowsState]:
        next_key, now = jax.random.split(state.key)
        rows = u.shape[0]
        live = takes_part(u)[:, 0]
        if self.efficiency == 1:
            weight = live.astype(jnp.float32)
            told = _summary(jnp.ones((), jnp.float32), weight)
        elif rows == 0:
            weight = jnp.zeros((0,), jnp.float32)
            told = _summary(jnp.ones((), jnp.float32), weight)
        else:
            score = _norms(u) * (seen["input_norms"] if self.by_product else 1)
            weight, told = self._drawn(now, jnp.where(live, score, _IDLE))
        p = Rows(u, weight, unchanged=self.efficiency == 1, share=self.density, drawn_together=self._rows)
        return p, _told(state, next_key, told)

    def _drawn(self, key: jax.Array, scores: Float[Array, " rows"]) -> tuple[jax.Array, Float[Array, " 3"]]:
        """Return the weights of the rows, and what is told of them.

        Where rows are cut up over devices, all of them get all scores, and each makes the whole draw, the same one:
        one exchange of a number a row, where the sums within a draw would be a hundred.
        """
        rows = scores.shape[0]
        kind = jax.random.key_impl(key)

        def all_of_them(bits: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
            live = ~(scores < 0)  # a score that is NaN is a row's
            among = self._by_group(jnp.where(live, scores, 0), live)
            key = jax.random.wrap_key_data(bits, impl=kind)
            drawn = draw(key, *among, efficiency=self.efficiency, count=self._groups_kept(rows))
            groups, size = grouping(rows, self._rows)
            weight = jnp.broadcast_to(drawn.weight[:, None], (groups, size)).reshape(-1)[:rows]
            weight = jnp.where(live, weight, 0)
            return weight, _summary(drawn.efficiency, weight)

        results = [((rows,), jnp.float32), ((3,), jnp.float32)]
        operands = jax.random.key_data(key), scores
        weight, told = by_axes("K, R -> R, T", results, lambda _: all_of_them, operands)
        return weight, told

    def at(self, where: Where) -> Sparsifier:
        group = where.rows_per_example if self.group == EXAMPLE else self.group
        return dataclasses.replace(self, group=group).sparsifier()

    @property
    def _rows(self) -> int:
        return 1 if isinstance(self.group, str) or self.group is None else self.group

    def _by_group(self, score: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the norm of each group, and which groups have a row that is not 0."""
        groups, size = grouping(score.shape[0], self._rows)
        if size == 1:
            return score, live
        missing = groups * size - score.shape[0]
        cut = lambda array: jnp.pad(array, (0, missing)).reshape(groups, size)
        return jnp.linalg.norm(cut(score), axis=1), cut(live).any(axis=1)

    def _groups_kept(self, rows: Any) -> int | jax.Array | None:
        """Return how many groups are kept; None where that is decided by their worth.

        Of any number of rows, as in a program for `jax.export`, a share is taken when it runs.

        Raises:
          ValueError: There are fewer.
        """
        groups, size = grouping(rows, self._rows)
        if self.density is not None and _compat.is_symbolic(rows):
            share = jnp.round(self.density * jnp.asarray(groups).astype(jnp.float32))
            return jnp.maximum(1, share.astype(jnp.int32))
        if self.density is not None:
            return max(1, round(self.density * groups))
        if _compat.is_symbolic(rows):
            return self.count
        if self.count is not None and rows and self.count > groups:
            what = "rows" if size == 1 else f"groups of {size} rows"
            raise ValueError(
                f"count={self.count} is more than the {groups} {what} that there are. Give a smaller count, or "
                "density= for a share of them."
            )
        return self.count


def _norms(u: Float[Array, "rows n"]) -> Float[Array, " rows"]:
    """Return the norms of the rows, up to a factor for all, without underflow; not finite where a row is not."""
    u = u.astype(jnp.float32)
    sizes = jnp.max(jnp.abs(u), axis=1)
    largest = jnp.max(jnp.where(jnp.isfinite(sizes), sizes, 0), initial=0)
    scale = jnp.where(largest > 0, 1 / jnp.maximum(largest, 1e-30), 1)
    return jnp.sqrt(jnp.square(u * scale).sum(axis=1))


def _summary(efficiency: Float[Array, ""], weight: Float[Array, " rows"]) -> Float[Array, " 3"]:
    """Return the efficiency, the share of the rows that are kept, and their number."""
    count = jnp.sum(weight != 0, dtype=jnp.float32)
    return jnp.stack([efficiency, count / jnp.maximum(jnp.ones_like(weight).sum(), 1), count])


def _told(state: SampledRowsState, key: jax.Array, told: Float[Array, " 3"]) -> SampledRowsState:
    """Return the state after a step: what it tells is a running mean, at first of all steps."""
    old = state.efficiency, state.density, state.kept
    efficiency, density, kept = (running(mean, new, state.steps) for mean, new in zip(old, told, strict=True))
    return SampledRowsState(key, efficiency, density, kept, state.steps + 1)
