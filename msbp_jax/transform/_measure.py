"""Plain and sparse steps on this machine: which is faster, with which groups of rows, and which layers to leave dense.

All candidates run in every round, so that a drift of the machine hits them alike, and each is called twice, the second
call counting: what ran before it is then no part of its time.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msbp_jax import _compat
from msbp_jax.kernels.choice import target
from msbp_jax.sparsifiers._regroup import group_of, regrouped
from msbp_jax.transform._program import Program
from msbp_jax.transform._shares import is_concrete
from msbp_jax.transform._step import Step, cotangents_of, make_step

BUDGET = 10.0  # seconds of steps, besides compilation
GROUPS: tuple[int | None, ...] = (1, 8, 32, None)
LAYERS = 6  # the dearest, each of which is left dense once
LEAST, MOST = 3, 25  # rounds
TELLING = 0.03  # share of a step by which a variant must be faster to be named: less is noise


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What steps took on this machine: medians, in seconds, without compilation.

    Attributes:
      plain: The dense step.
      sparse: The sparse step, as planned.
      groups: The sparse step with other `rows_per_group`, for the whole plan.
      left_dense: The sparse step with one layer left dense, by its name.
      not_tried: Variants for which the time did not suffice.
      rounds: How many times each was timed.
      device: On what.
      at: Which share of the gradient's rows was not 0, in words that follow "Measured"; "" for all that it has.
    """

    plain: float
    sparse: float
    groups: tuple[tuple[int | None, float], ...]
    left_dense: tuple[tuple[str, float], ...]
    not_tried: tuple[str, ...]
    rounds: int
    device: str
    at: str = ""

    @property
    def speed_up(self) -> float:
        """How many times faster the sparse step is, as planned."""
        return self.plain / self.sparse

    @property
    def leave_dense(self) -> tuple[str, ...]:
        """The layers whose sparse backward is slower than their dense one, the one that costs most first."""
        faster = [(took, name) for name, took in self.left_dense if took < (1 - TELLING) * self.sparse]
        return tuple(name for _, name in sorted(faster))

    @property
    def better_groups(self) -> tuple[tuple[int | None, float], ...]:
        """The `rows_per_group` that is faster than the plan's, with its seconds; nothing if none is."""
        best = sorted(self.groups, key=lambda pair: pair[1])[:1]
        return tuple(pair for pair in best if pair[1] < (1 - TELLING) * self.sparse)

    @property
    def train_dense(self) -> bool:
        """Whether nothing that was tried is faster than the dense step, by more than noise."""
        return (1 - TELLING) * self.plain <= min([self.sparse, *(took for _, took in (*self.groups, *self.left_dense))])


def measure(
    program: Program,
    params: Any,
    *,
    optimizer: optax.GradientTransformation | None,
    share: float | None,
    dearest: Sequence[str],
) -> Measured:
    """Time steps of a program, plain and sparse, and of variants of its plan.

    Args:
      program: The program; its arguments are arrays.
      params: The pytree that its first arguments are the leaves of.
      optimizer: What the gradients are handed to; None for nothing.
      share: Of the rows, that of the cotangent that are not 0; None for all.
      dearest: The sparse sites, that with the largest cost first.

    Raises:
      TypeError: The optimizer's update needs more than gradients, state, parameters and a loss.
      ValueError: Arguments are shapes, or traced; or it is called inside of jit.
    """
    inside = isinstance(jnp.zeros(()), _compat.Tracer)  # under jit, even where all arguments are closed over
    if inside or not all(map(is_concrete, jax.tree.leaves(program.arguments))):
        raise ValueError(
            "report(measure=True) runs training steps, and needs arrays in all arguments, got shapes or tracers. Pass "
            "arrays, outside of jit, or leave measure= out: what is expected needs shapes alone."
        )
    cotangents = cotangents_of(program, share)
    step = lambda changed, plain=False: make_step(changed, params, cotangents, optimizer, plain=plain)
    calls = {"plain": _call(step(program, True)), "sparse": _call(step(program))}
    started = {name: _seconds(call) for name, call in calls.items()}
    longest = max(started.values())
    variants = _variants(program, dearest)
    twice = 2 if longest * 2 * LEAST * len(calls) < BUDGET else 1
    affordable = max(0, int(BUDGET / ((LEAST * twice + 2) * longest)) - len(calls))
    tried = dict(list(variants.items())[:affordable])
    calls |= {name: _call(step(changed)) for name, changed in tried.items()}
    medians, rounds = _medians(calls, twice)
    return Measured(
        plain=medians["plain"],
        sparse=medians["sparse"],
        groups=tuple((r, medians[_grouped(r)]) for r in GROUPS if _grouped(r) in medians),
        left_dense=tuple((name, medians[_dense(name)]) for name in dearest if _dense(name) in medians),
        not_tried=tuple(name for name in variants if name not in tried),
        rounds=rounds,
        device=target.device().kind,
    )


def _variants(program: Program, dearest: Sequence[str]) -> dict[str, Program]:
    """Return programs with other groups, and with a layer left dense, the most telling first."""
    settings = {group_of(site.sparsifier) for site in program.sparse_sites if site.sparsifier is not None}
    found = {}
    for rows_per_group in GROUPS:
        if settings - {None, (rows_per_group,)}:
            found[_grouped(rows_per_group)] = _with_groups(program, rows_per_group)
    if len(dearest) > 1:  # of a single one that would be the plain step
        found |= {_dense(name): _with_dense(program, name) for name in dearest[:LAYERS]}
    return found


def _grouped(rows_per_group: int | None) -> str:
    return f"rows_per_group={rows_per_group}"


def _dense(name: str) -> str:
    return f"{name} dense"


def _with_groups(program: Program, rows_per_group: int | None) -> Program:
    changed = {
        site.name: regrouped(site.sparsifier, rows_per_group) for site in program.sparse_sites if site.sparsifier
    }
    sites = [dataclasses.replace(s, sparsifier=changed.get(s.name) or s.sparsifier) for s in program.sites]
    return dataclasses.replace(program, sites=sites)


def _with_dense(program: Program, name: str) -> Program:
    sites = [dataclasses.replace(s, sparsifier=None if s.name == name else s.sparsifier) for s in program.sites]
    return dataclasses.replace(program, sites=sites)


def _call(step: Step) -> Callable[[], None]:
    """Return a call of a compiled step that ends when its results are ready."""
    compiled = jax.jit(step.run).lower(*step.arguments).compile()

    def call() -> None:
        jax.block_until_ready(compiled(*step.arguments))

    call()
    return call


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _medians(calls: dict[str, Callable[[], None]], twice: int) -> tuple[dict[str, float], int]:
    """Return the median seconds of each call, and the number of rounds that the time sufficed for."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(1, MOST + 1):
        for name, call in calls.items():
            if twice > 1:
                call()
            seconds[name].append(_seconds(call))
        spent = time.perf_counter() - start
        if number >= LEAST and spent * (number + 1) / number > BUDGET:
            break
    return {name: statistics.median(times) for name, times in seconds.items()}, number
