"""Schedules that exchange entries and keep their number: shapes stay, and a compiled step is compiled once."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from msbp_jax import _checks, _compat
from msbp_jax.dynamic._moments import owners
from msbp_jax.dynamic._replace import Replaced, entry_counts, followed, replaced
from msbp_jax.dynamic._schedule import (
    DenseGradFn,
    SparsitySchedule,
    SparsityState,
    check_still_sparse,
    leaves_of,
    mark,
    marks_of,
    patterns_of,
    started,
    with_leaves,
    with_new_patterns,
)
from msbp_jax.weights import SPARSITY, Pattern

type Fraction = float | Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Exchange(SparsitySchedule):
    """Every so many steps, the smallest entries of each weight give way to other places.

    Attributes:
      every: Steps between changes.
      until: The step from which on nothing changes; None for never.
      fraction: Share of the entries that is dropped, or a function of the step.
    """

    every: int
    until: int | None
    fraction: Fraction

    draws = False  # whether places are drawn, so that there is a key
    regrow = False  # whether a place that was just dropped may be chosen again

    @abc.abstractmethod
    def scores(
        self,
        variables: Mapping[str, Any],
        patterns: Mapping[str, Pattern],
        key: jax.Array | None,
        dense_grad_fn: DenseGradFn | None,
    ) -> dict[str, jax.Array]:
        """Return how much each place is worth, 0 or more, by path of the weight and in its dense shape."""

    def init(self, variables: Mapping[str, Any], key: jax.Array | None = None) -> SparsityState:
        """Return the state before the first step; see `SparsitySchedule.init`."""
        state = started(variables, key, draws=type(self).__name__ if self.draws else None)
        self._changing(variables)
        return state

    def due(self, state: SparsityState) -> Bool[Array, ""]:
        """Return whether the next `update` changes patterns."""
        step = state.step + 1
        due = step % self.every == 0
        return jnp.asarray(due if self.until is None else due & (step < self.until))

    def update(
        self,
        tx: Any,
        variables: Mapping[str, Any],
        opt_state: Any,
        state: SparsityState,
        dense_grad_fn: DenseGradFn | None = None,
    ) -> tuple[dict[str, Any], Any, SparsityState]:
        """Count a step; if it is due, exchange entries. Works under `jit`; see `SparsitySchedule.update`."""
        if self.draws and state.key is None:
            raise ValueError(
                f"The state of {type(self).__name__} has no key: schedule.init(variables, jax.random.key(0))."
            )
        self._check_sizes(variables, state)
        check_still_sparse(variables, state)
        patterns = self._changing(variables)
        params = leaves_of(variables["params"])
        whose = owners(tx, opt_state, variables["params"], patterns)
        leaves, structure = jax.tree.flatten(opt_state)
        step = jnp.asarray(state.step + 1)

        # Only what may change goes through the branches, so that nothing else is copied at other steps.
        def exchange(patterns: dict[str, Pattern], values: dict[str, Any], moments: list[Any]) -> tuple[Any, ...]:
            now = {**variables, "params": with_leaves(variables["params"], values)}
            now[SPARSITY] = with_new_patterns(variables[SPARSITY], patterns)
            key = None if state.key is None else jax.random.fold_in(state.key, step)
            scores = self.scores(now, patterns, key, dense_grad_fn)
            share = self.share(step)
            new = {
                name: _exchanged(patterns[name], values[name], scores[name], share, self.regrow) for name in patterns
            }
            follow = lambda name, array: followed(new[name].source, array)
            return (
                {name: replacement.pattern for name, replacement in new.items()},
                {name: follow(name, array) for name, array in values.items()},
                [follow(name, array) for name, array in zip(owned, moments, strict=True)],
                {name: mark(replacement.pattern) for name, replacement in new.items()},
            )

        owned = [name for name in whose if name is not None]
        moments = [leaf for leaf, name in zip(leaves, whose, strict=True) if name is not None]
        operands = (patterns, {name: jnp.asarray(params[name]) for name in patterns}, list(map(jnp.asarray, moments)))
        before = marks_of(variables, patterns) if state.marks is None else state.marks
        due, marks = self.due(state), {name: jnp.asarray(before[name]) for name in patterns}
        found = (*operands, marks)
        if isinstance(due, _compat.Tracer):
            found = jax.lax.cond(due, exchange, lambda *operands: (*operands, marks), *operands)
        elif bool(due):
            found = exchange(*operands)
        new_patterns, values, moments, marks = found
        following = iter(moments)
        leaves = [leaf if name is None else next(following) for leaf, name in zip(leaves, whose, strict=True)]
        new = {**variables, "params": with_leaves(variables["params"], values)}
        new[SPARSITY] = with_new_patterns(variables[SPARSITY], new_patterns)
        return new, jax.tree.unflatten(structure, leaves), state._replace(step=step, marks=marks)

    def share(self, step: jax.Array) -> jax.Array:
        """Return the share of the entries that is dropped at a step."""
        share = self.fraction(step) if callable(self.fraction) else self.fraction
        return jnp.clip(jnp.asarray(share, jnp.float32), 0.0, 1.0)

    def _changing(self, variables: Mapping[str, Any]) -> dict[str, Pattern]:
        patterns = patterns_of(variables)
        if in_blocks := [name for name, pattern in patterns.items() if pattern.block is not None]:
            raise ValueError(
                f"{in_blocks[0]} has blocks of {patterns[in_blocks[0]].block}, and {type(self).__name__} exchanges "
                "single entries. Prune with block=None, or keep the pattern by msbp.static_sparsity()."
            )
        return patterns


@jax.jit(static_argnames="regrow")
def _exchanged(
    pattern: Pattern, values: jax.Array, scores: jax.Array, share: Float[Array, ""], regrow: bool
) -> Replaced:
    counts: Int[Array, ...] = jnp.floor(share * entry_counts(pattern).astype(jnp.float32)).astype(jnp.int32)
    return replaced(pattern, values, scores, counts, regrow=regrow)


def check_exchange(every: Any, until: Any, fraction: Any) -> tuple[int, int | None, Fraction]:
    """Return the arguments of a schedule, or raise for what is none.

    Raises:
      TypeError: A number of steps that is not whole, or a share that is no number.
      ValueError: One out of range, or an end before the first change.
    """
    every = _checks.positive_int("every", every, "steps between changes")
    if until is not None:
        until = _checks.positive_int("until", until, "the step from which on nothing changes")
        if until <= every:
            raise ValueError(
                f"until must be larger than every, as the first change is at step {every}: got until={until}, so that "
                "the schedule ends before it starts. For a pattern that stays there is msbp.static_sparsity()."
            )
    meaning = "share of the entries that is dropped"
    if callable(fraction):
        _checks.fraction("fraction(0)", np.asarray(fraction(0)).item(), zero=True, meaning=meaning)
        return every, until, fraction
    return every, until, _checks.fraction("fraction", fraction, zero=True, meaning=meaning)
