"""Gradual magnitude pruning: fewer entries from stage to stage, each with programs of its own."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from msbp_jax import _checks, _compat
from msbp_jax.dynamic import _shrink
from msbp_jax.dynamic._like import pruned_shapes, resized
from msbp_jax.dynamic._moments import check_like_new, moved
from msbp_jax.dynamic._schedule import (
    DenseGradFn,
    SparsitySchedule,
    SparsityState,
    check_key,
    check_variables,
    marks_of,
    patterns_of,
    sizes_of,
)

type Scope = Literal["layer", "global", "erdos_renyi"]


def gradual_pruning(
    density: float | None = None,
    *,
    begin: int | None = None,
    end: int | None = None,
    every: int | None = None,
    initial_density: float = 1.0,
    stages: Mapping[int, float] | None = None,
    scope: Scope = "layer",
    include: Sequence[str] | None = None,
    input_axes: Mapping[str, int] | None = None,
    stacked: Sequence[str] = (),
    block: tuple[int, int] | None = None,
) -> GradualPruning:
    """Return the schedule of gradual magnitude pruning: at each stage, the largest of what there is are kept.

        d(t) = density + (initial_density - density) (1 - (t - begin) / (end - begin))^3
        t = begin, begin + every, .., end

    A leaf of entries has one axis, from the first stage on: a mask of weight decay by `ndim` loses its kernels
    there; make it by path. Leaves become shorter, so `update` runs outside of `jit`, after the compiled step, and
    that is compiled once a stage. Until the first stage variables may be dense; weights, and moments with them, are
    then gathered as `msbp.prune` does. SparseProp's schedule, for E steps an epoch, is `begin=10 E, end=80 E,
    every=10 E, initial_density=0.95`, in 100 epochs.

    Args:
      density: Share of the entries that is kept in the end.
      begin: The step of the first stage, 1 or later: it is pruned after so many updates.
      end: The step of the last stage.
      every: Steps from stage to stage.
      initial_density: Share that is kept at the first stage. At 1 this changes nothing, as in the paper.
      stages: In place of the above, `{step: density}`, each at most that of the step before.
      scope: As for `msbp.prune`: `"layer"`, `"global"` or `"erdos_renyi"`, of all entries that dense weights had.
      include: As for `msbp.prune`, which weights; of variables that are sparse already, by default all that are.
      input_axes: As for `msbp.prune`.
      stacked: As for `msbp.prune`.
      block: As for `msbp.prune`.

    Returns:
      A schedule. Its `init` takes variables, dense or sparse, and no key; `due(state)` says, as a bool, whether the
      next `update` prunes, `density(step)` what a stage keeps, and `like(variables, state)` how large the variables of
      a stage are, which a checkpoint is restored into.

    Raises:
      TypeError: A number of steps that is not whole, or a density that is no number.
      ValueError: A density out of (0, 1], stages that grow, an end before the beginning, or both ways of saying it.

    Example:
      >>> import jax.numpy as jnp, optax, msbp_jax as msbp
      >>> schedule = msbp.gradual_pruning(0.25, begin=2, end=6, every=2, initial_density=0.75)
      >>> variables, tx = {"params": {"kernel": jnp.arange(16.0).reshape(4, 4)}}, optax.adam(1e-3)
      >>> opt_state, state = tx.init(variables["params"]), schedule.init(variables)
      >>> for _ in range(6):
      ...     pruned = schedule.due(state)
      ...     variables, opt_state, state = schedule.update(tx, variables, opt_state, state)
      ...     if pruned:
      ...         print(int(state.step), variables["params"]["kernel"].size)
      2 12
      4 5
      6 4

    References:
      Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for model compression, 2017 (arXiv
      1710.01878). Nikdan et al., SparseProp, 2023 (arXiv 2302.04852).
    """
    if (density is None) == (stages is None):
        raise ValueError("gradual_pruning takes a final density with begin=, end= and every=, or stages= alone.")
    if stages is None:
        found = _cubic(density, begin, end, every, initial_density)
    elif (begin, end, every, initial_density) != (None, None, None, 1.0):
        raise ValueError("Stages say all: with stages= there is no begin=, end=, every= or initial_density=.")
    else:
        found = _given(stages)
    if scope not in ("layer", "global", "erdos_renyi"):
        raise ValueError(f'scope must be "layer", "global" or "erdos_renyi", got {scope!r}.')
    options = {"scope": scope, "include": include, "input_axes": input_axes, "stacked": stacked, "block": block}
    return GradualPruning(found, options)


@dataclasses.dataclass(frozen=True)
class GradualPruning(SparsitySchedule):
    """Stages, each with fewer entries than the one before.

    Attributes:
      stages: By step, ascending, the share of the entries that is kept from there on, below 1.
      options: Those of `msbp.prune`.
    """

    stages: Mapping[int, float]
    options: Mapping[str, Any]

    changes_shapes = True

    def __hash__(self) -> int:
        """Return a hash of the stages, as options may be lists."""
        return hash(tuple(self.stages.items()))

    def density(self, step: int) -> float:
        """Return the share of the entries that is there after so many updates; 1 before the first stage."""
        return min((share for begins, share in self.stages.items() if begins <= step), default=1.0)

    def init(self, variables: Mapping[str, Any], key: jax.Array | None = None) -> SparsityState:
        """Return the state before the first step; see `SparsitySchedule.init`.

        What the last stage would keep is found out here, so that what cannot be pruned is refused before training.
        """
        check_key(key, None)
        names = self._names(variables)
        # Numbers of the host: a loop asks at every step whether it is due, and need not wait for a device.
        entries: dict[str, Any] = {n: np.asarray(size, np.int32) for n, size in sizes_of(variables, names).items()}
        return SparsityState(np.zeros((), np.int32), entries, marks=marks_of(variables, names))  # type: ignore[arg-type]

    def due(self, state: SparsityState) -> bool:
        """Return whether the next `update` prunes."""
        return _number(state.step) + 1 in self.stages

    def update(
        self,
        tx: Any,
        variables: Mapping[str, Any],
        opt_state: Any,
        state: SparsityState,
        dense_grad_fn: DenseGradFn | None = None,
    ) -> tuple[dict[str, Any], Any, SparsityState]:
        """Count a step; if it is due, prune. Runs outside of `jit`; see `SparsitySchedule.update`."""
        del dense_grad_fn
        step = _number(state.step) + 1
        self._check_sizes(variables, state)
        count: Any = np.asarray(step, np.int32)
        if step not in self.stages:
            return dict(variables), opt_state, state._replace(step=count)
        new, patterns = _shrink.shrunk(variables, list(state.entries), self.stages[step], self.options)
        moves = {name: _shrink.move(patterns.old.get(name), pattern) for name, pattern in patterns.new.items()}
        opt_state = moved(tx, opt_state, variables["params"], moves)
        if not patterns.old:
            check_like_new(tx, opt_state, new["params"])
        entries: dict[str, Any] = {n: np.asarray(size, np.int32) for n, size in sizes_of(new, state.entries).items()}
        return new, opt_state, SparsityState(count, entries, marks=marks_of(new, state.entries))

    def like(self, variables: Mapping[str, Any], state: SparsityState) -> dict[str, Any]:
        """Return shapes and dtypes of the variables of a stage; see `SparsitySchedule.like`."""
        step = _number(state.step)
        if step < next(iter(self.stages)):
            return super().like(variables, state)
        begun = variables if patterns_of(variables) else pruned_shapes(variables, self.density(step), self.options)
        patterns = {name: pattern for name, pattern in patterns_of(begun).items() if name in state.entries}
        found: dict[str, Any] = resized(begun, patterns, {name: int(count) for name, count in state.entries.items()})
        return found

    def _names(self, variables: Mapping[str, Any]) -> list[str]:
        """Return the weights that are pruned.

        Raises:
          ValueError: There is none, a pattern of paths names none, or nothing would be kept of one.
        """
        patterns, last = patterns_of(check_variables(variables)), min(self.stages.values())
        if not patterns:
            tried = 1.0 if self.options["scope"] == "global" else last  # which are the largest of all changes till then
            pruned, _ = _shrink.shrunk(variables, [], tried, self.options)
            return list(patterns_of(pruned))
        include = self.options["include"]
        if isinstance(include, str):
            raise TypeError(f"include takes a list of patterns, got the string {include!r}. Write [{include!r}].")
        names = [name for name in patterns if include is None or any(fnmatch.fnmatchcase(name, p) for p in include)]
        for pattern in include or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in patterns):
                raise ValueError(f"include: {pattern!r} matches none of the sparse weights {', '.join(patterns)}.")
        if {*self.options["stacked"], *(self.options["input_axes"] or {})} or self.options["block"]:
            raise ValueError(
                "These variables are sparse already, and their patterns say what is stacked, which axes are inputs and "
                "what comes in blocks: leave out stacked=, input_axes= and block=."
            )
        if not names:
            raise ValueError("include=[] names no weight: leave it out for all that are sparse.")
        _shrink.check_capacity(patterns, names, next(iter(self.stages.values())), self.options["scope"])
        if self.options["scope"] != "global":  # which are the largest of all is not known before
            _shrink.shrunk(variables, names, last, self.options)
        return names


def _number(step: Any) -> int:
    if isinstance(step, _compat.Tracer):
        raise TypeError(
            "gradual_pruning changes shapes, and so runs outside of jit: call update after the compiled step. The "
            "state need not pass through it."
        )
    return int(step)


def _cubic(density: Any, begin: Any, end: Any, every: Any, initial_density: Any) -> dict[int, float]:
    last = _checks.fraction("density", density, zero=False, meaning="share of the entries that is kept in the end")
    first = _checks.fraction("initial_density", initial_density, zero=False, meaning="share that is kept at first")
    if first < last:
        raise ValueError(
            f"Pruning goes from initial_density={first:g} to density={last:g}, which grows density above its capacity: "
            "what was dropped is not there any more. Give an initial_density of at least the last one."
        )
    begin = _checks.positive_int("begin", begin, "the step of the first stage")
    end = _checks.positive_int("end", end, "the step of the last stage")
    every = _checks.positive_int("every", every, "steps from stage to stage")
    if end < begin:
        raise ValueError(f"The schedule ends before it starts: got begin={begin} and end={end}.")
    found = {}
    for step in (*range(begin, end, every), end):
        left = 1 - (step - begin) / (end - begin) if end > begin else 0.0
        found[step] = last + (first - last) * left**3
    return _pruning(found)


def _given(stages: Any) -> dict[int, float]:
    if not isinstance(stages, Mapping) or not stages:
        raise TypeError(f"stages must be {{step: density}}, with one stage at least, got {stages!r}.")
    meaning = "share of the entries that is kept"
    found = {
        _checks.positive_int("A step of stages", step, "after which update it is pruned"): _checks.fraction(
            f"The density of stage {step}", share, zero=False, meaning=meaning
        )
        for step, share in stages.items()
    }
    found = dict(sorted(found.items()))
    for (before, more), (after, share) in zip(found.items(), list(found.items())[1:], strict=False):
        if share > more:
            raise ValueError(
                f"The stages go from density {more:g} at step {before} to {share:g} at step {after}, which grows "
                "density above its capacity: what was dropped is not there any more. Give densities that do not grow."
            )
    return _pruning(found)


def _pruning(stages: dict[int, float]) -> dict[int, float]:
    """Return stages without those that keep all there is."""
    shares = list(stages.values())
    found = {
        step: share for (step, share), before in zip(stages.items(), [1.0, *shares], strict=False) if share < before
    }
    if not found:
        raise ValueError("The schedule prunes nothing, as its densities are 1. Give a smaller one.")
    return found
