"""Ways to a small network: by subnetworks, narrow from the start, and by pruning units of a dense one.

Each ends with a network of about the same number of units, trained for as many epochs; the last fifth is fine-tuning
where there is a change of the network. Seconds are those of steps; the first call of each program, which compiles it,
is counted apart, tests are not counted.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.helpers.accuracy import percent_right
from benchmarks.helpers.clock import Clock
from benchmarks.subnetwork.tasks import Task, loss_fn

type Run = dict[str, Any]
TUNED = 0.2  # share of the epochs


def plain_step(module: Any, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Return a step of a plain module: `(state, x, y) -> (state, loss)`."""

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, stats, opt_state = state
        of = lambda params: loss_fn(module, params, stats, x, y)
        (loss, stats), grads = jax.value_and_grad(of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return step


def narrow_step(
    sub: msbp.Subnetwork, tx: optax.GradientTransformation, *, kept_only: bool = True
) -> Callable[..., Any]:
    """Return a step by subnetworks: `(state, sample, x, y) -> (state, loss)`."""

    def step(state: Any, sample: msbp.Sample, x: jax.Array, y: jax.Array) -> Any:
        params, stats, opt_state, structure = state
        run = sub.value_and_grad(loss_fn, has_aux=True, kept_only=kept_only)
        (loss, stats), grads, of_structure = run(params, structure, sample, stats, x, y)
        if kept_only:
            params, opt_state = sub.update_kept(tx, grads, opt_state, params, sample.first)
        else:
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return (params, stats, opt_state, sub.update(of_structure, structure)), loss

    return step


def split(variables: Any) -> tuple[Any, Any]:
    """Return parameters and statistics."""
    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}


def accuracy(task: Task, module: Any, params: Any, stats: Any) -> float:
    """Return how much of the test set is told right, in percent."""
    x, y = jnp.asarray(task.images.test_x), jnp.asarray(task.images.test_y)
    return round(percent_right(module, {"params": params, **stats}, x, y), 3)


def _trained(task: Task, module: Any, variables: Any, epochs: range, rate_of: float, seed: int, clock: Clock) -> Any:
    """Return variables after epochs of plain training."""
    tx = task.optimizer(rate_of)
    step = jax.jit(plain_step(module, tx), donate_argnums=0)
    params, stats = split(variables)
    state = jax.tree.map(jnp.copy, (params, stats, tx.init(params)))
    x, y = jnp.asarray(task.images.train_x), jnp.asarray(task.images.train_y)
    for epoch in epochs:
        for rows in task.order(seed, epoch):
            state, _ = clock.call(step, state, x[rows], y[rows])
    return {"params": state[0], **state[1]}


def narrower(task: Task, share: float) -> dict[str, int]:
    """Return widths of which each is a share of the full one."""
    return {name: max(1, round(share * width)) for name, width in task.widths.items()}


def dense(task: Task, share: float, seed: int) -> Run:
    """Train a plain network of a share of the widths."""
    widths = narrower(task, share)
    clock, module = Clock(), task.build(widths)
    variables = _trained(task, module, task.init(widths, seed), range(task.epochs), task.epochs, seed, clock)
    return clock.told() | {"accuracy": accuracy(task, module, *split(variables)), "units": sum(widths.values())}


@functools.cache
def _before_pruning(task: Task, seed: int) -> tuple[Any, Clock]:
    """Return what is alike for all shares: variables of a dense network before the last epochs, and its clock."""
    clock, module = Clock(), task.build(task.widths)
    first, _ = _epochs(task)
    return _trained(task, module, task.init(task.widths, seed), first, len(first), seed, clock), clock


def by_magnitude(task: Task, share: float, seed: int) -> Run:
    """Train a dense network, keep the units with the largest weights, and fine-tune."""
    variables, dense_clock = _before_pruning(task, seed)
    clock, (_, last) = copy.copy(dense_clock), _epochs(task)
    units = task.units(variables)
    sub = msbp.subnetwork(task.build, units=units, widths=dict(task.widths), budget=share)
    scores = {name: _norms(group, variables["params"]) for name, group in units.items()}
    masks = {name: _largest(norm, max(1, round(share * len(norm)))) for name, norm in scores.items()}
    return _tuned(task, sub, variables, msbp.Chosen.of(masks), last, seed, clock)


def by_subnetworks(task: Task, share: float, seed: int) -> Run:
    """Train by subnetworks, keep the best draw, and fine-tune."""
    clock = Clock()
    variables = task.init(task.widths, seed)
    sub = msbp.subnetwork(task.build, units=task.units(variables), widths=dict(task.widths), budget=share)
    first, last = _epochs(task)
    tx = task.optimizer(len(first))
    step = jax.jit(narrow_step(sub, tx), donate_argnums=0)
    params, stats = split(variables)
    state = jax.tree.map(jnp.copy, (params, stats, tx.init(params), sub.init(variables)))
    x, y = jnp.asarray(task.images.train_x), jnp.asarray(task.images.train_y)
    key, at, drawing, sample = jax.random.key(seed), 0, 0.0, None
    for epoch in first:
        for rows in task.order(seed, epoch):
            begun = time.perf_counter()
            sample = sub.sample(state[3], jax.random.fold_in(key, at), sample)
            drawing += time.perf_counter() - begun
            state, _ = clock.call(step, state, sample, x[rows], y[rows])
            at += 1
    clock.steps += drawing
    variables = {"params": state[0], **state[1]}
    rows = task.order(seed, task.epochs)[0]
    score = lambda model, variables, x, y: loss_fn(model.model, variables["params"], split(variables)[1], x, y)[0]
    begun = time.perf_counter()
    best = sub.best(state[3], variables, jax.random.fold_in(key, at), score, x[rows], y[rows])
    selecting = time.perf_counter() - begun
    certain = np.concatenate([np.asarray(s) for s in state[3].probabilities.values()])
    settled = round(float(((certain < 0.02) | (certain > 0.98)).mean()), 3)
    return _tuned(task, sub, variables, best, last, seed, clock) | {
        "drawing": round(drawing, 2),
        "selecting": round(selecting, 2),
        "settled": settled,
    }


def _tuned(
    task: Task, sub: msbp.Subnetwork, variables: Any, chosen: msbp.Chosen, epochs: range, seed: int, clock: Clock
) -> Run:
    module, small = sub.extract(variables, chosen)
    before = accuracy(task, module, *split(small))
    small = _trained(task, module, small, epochs, len(epochs), seed, clock)
    return clock.told() | {
        "before tuning": before,
        "accuracy": accuracy(task, module, *split(small)),
        "units": sum(chosen.counts().values()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(small["params"])),
    }


def _epochs(task: Task) -> tuple[range, range]:
    last = max(1, round(TUNED * task.epochs))
    return range(task.epochs - last), range(task.epochs - last, task.epochs)


def _norms(group: Any, params: Any) -> np.ndarray:
    """Return the norm of all weights of each unit, of which each leaf counts by its mean square."""
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}  # fmt: skip
    total = np.zeros(group.size)
    for axis in group.axes:
        if axis.path in flat and flat[axis.path].ndim > 1:
            leaf = np.moveaxis(np.asarray(flat[axis.path]), axis.axis, 0)
            cut = leaf.reshape(-1, group.size, axis.inner, leaf[0].size)
            total += np.square(cut).mean(axis=(0, 2, 3))
    return total


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


METHODS: dict[str, Callable[[Task, float, int], Run]] = {
    "subnetworks": by_subnetworks,
    "narrow": dense,
    "magnitude": by_magnitude,
}
