"""Ways to a sparse network, and a dense one beside them.

dense    all weights
static   a random pattern (Erdos-Renyi) that stays
set      the same at first; every 100 steps three tenths of the entries, the smallest, give way to places that are drawn
rigl     to places where the dense gradient is largest; both until three quarters of the steps
gradual  dense for a tenth of the steps, then the largest entries along a cubic, in eight stages from 95 % on, until
         four fifths of the steps (SparseProp)
early    the same from 50 % on, in five stages, until half of the steps: sooner cheap, and longer as sparse as it ends
longer   the same for three tenths more epochs: what a faster step may be spent on

Steps are called one by one. Seconds are those of steps and of changes of the patterns; calls that compile are counted
apart, tests are not counted. The seconds of a change by gradual pruning are those of `update`, whatever it compiles
included.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.helpers.clock import Clock
from benchmarks.sparse_training.tasks import Task, loss_fn
from msbp_jax.weights import SPARSITY, is_pattern

METHODS = ("dense", "static", "set", "rigl", "gradual", "early", "longer")
GRADUAL = ("gradual", "early", "longer")
FRACTION = 0.3
LONGER = 1.3  # epochs of `longer`, times those of the others

type Run = dict[str, Any]


def schedule_of(method: str, task: Task) -> msbp.SparsitySchedule | None:
    """Return when and how patterns change, in as many epochs as the task has; None for dense weights."""
    steps = task.epochs * task.steps
    until = max(task.every + 1, round(0.75 * steps))
    begin = max(1, round(0.1 * steps))
    match method:
        case "static":
            return msbp.static_sparsity()
        case "set":
            return msbp.sparse_evolution(every=task.every, until=until, fraction=FRACTION)
        case "rigl":
            return msbp.rigl(every=task.every, until=until, fraction=FRACTION)
        case "gradual" | "early" | "longer":
            share, stages, first = (0.8, task.stages, 0.95) if method == "gradual" else (0.5, task.early_stages, 0.5)
            end = max(begin + 1, round(share * steps))
            every = math.ceil((end - begin) / (stages - 1))
            return msbp.gradual_pruning(
                task.density, begin=begin, end=end, every=every, initial_density=first, **task.pruning
            )
    return None


def run(method: str, task: Task, seed: int) -> Run:
    """Train to the end; return what was reached and what it took.

    Args:
      method: One of `METHODS`.
      task: What is trained.
      seed: Of the weights at first, of patterns and of the order of examples.
    """
    if method == "longer":
        task = dataclasses.replace(task, epochs=round(LONGER * task.epochs))
    training = _Training(method, task, seed)
    accuracies, seconds, y = [], [], jnp.asarray(task.images.train_y)
    for epoch in range(task.epochs):
        x, order = task.epoch(seed, epoch)
        for rows in order:
            training.advance(jnp.asarray(x[rows]), y[rows])
        seconds.append(round(training.clock.steps, 3))
        accuracies.append(accuracy(task, training.carry[0]))
    training.end_stage()
    variables, opt_state = training.carry
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return training.clock.told() | {
        "accuracy": accuracies[-1],
        "accuracies": accuracies,
        "seconds after epochs": seconds,
        "updating": round(training.updating, 3),
        "stages": training.stages,
        "state bytes": size((variables["params"], opt_state)),
        "pattern bytes": size(variables.get(SPARSITY, {})),
        "density in the end": density_of(variables),
    }


def accuracy(task: Task, variables: Any) -> float:
    """Return how much of the test set the plain network tells right with dense weights, in percent."""
    variables, x, y = msbp.densify(variables), task.images.test_x, task.images.test_y
    size = min(1000, len(y))
    starts = range(0, len(y) // size * size, size)
    right = [_right(task.module, variables, x[at : at + size], y[at : at + size]) for at in starts]
    return round(100 * float(np.mean(right)), 3)


def density_of(variables: Any) -> float:
    """Return the share of the entries that weights with a pattern have; 1 where there is none."""
    patterns = jax.tree.leaves(variables.get(SPARSITY, {}), is_leaf=is_pattern)
    whole = sum(math.prod(pattern.shape) for pattern in patterns)
    return round(sum(pattern.entries for pattern in patterns) / whole, 4) if whole else 1.0


class _Training:
    """A run as it goes.

    Attributes:
      carry: Variables and the optimizer's state.
      clock: Of what is counted.
      updating: Seconds, of those, of updates that run outside of `jit`.
      stages: Density, steps and seconds for as long as the shapes were the same; the change before them is among them.
    """

    def __init__(self, method: str, task: Task, seed: int) -> None:
        key = jax.random.fold_in(jax.random.key(7), seed)
        self._tx, self._module, self._sparse = task.optimizer(), task.module, msbp.sparse_weights(task.module)
        self._schedule: Any = schedule_of(method, task)  # with a state of its own, or None, as that of a dense network
        self._state: Any = None
        variables = task.init(seed)
        if self._schedule is not None:
            variables = variables if self._schedule.changes_shapes else _random(task, variables, key)
            self._state = self._schedule.init(variables, jax.random.fold_in(key, 1) if method == "set" else None)
        # What is donated is copied: no leaf is there twice.
        self.carry = jax.tree.map(jnp.copy, (variables, self._tx.init(variables["params"])))
        # A convolution within a branch of XLA's takes tens of times as long on a CPU: RigL's dense gradient
        # is then a program of its own, called at the steps that are due.
        self._gradient_apart = method == "rigl" and task.convolutions
        self._inside = self._schedule is not None and not self._schedule.changes_shapes and not self._gradient_apart
        self._step = jax.jit(self._stepped, donate_argnums=0)
        self._change = jax.jit(self._changed, donate_argnums=0)
        self._gradient = jax.jit(self._dense_gradient)
        self.clock, self.updating = Clock(), 0.0
        self.stages: list[Run] = []
        self._taken, self._begun = 0, 0.0  # steps of this stage, and the clock at its beginning
        self._change_took = 0.0  # seconds of the change with which it began

    def advance(self, x: jax.Array, y: jax.Array) -> None:
        """Take a step, and change patterns if that is due."""
        self._taken += 1
        if self._schedule is None or self._inside:
            self.carry, self._state = self.clock.call(self._step, self.carry, self._state, x, y)
            return
        self.carry, _ = self.clock.call(self._step, self.carry, None, x, y)
        due = bool(self._schedule.due(self._state))
        if self._gradient_apart:
            grads = self.clock.call(self._gradient, self.carry[0], x, y) if due else None
            self.carry, self._state = self.clock.call(self._change, self.carry, self._state, grads)
            return
        if due:
            self.end_stage()
        before = self.clock.steps
        *carry, self._state = self.clock.outside(self._schedule.update, self._tx, *self.carry, self._state)
        self.carry = tuple(carry)
        self.updating += self.clock.steps - before
        if due:
            self._change_took = self.clock.steps - before

    def end_stage(self) -> None:
        """Write down what the steps since the last change of shapes have taken."""
        seconds = {"seconds": round(self.clock.steps - self._begun, 3), "of the change": round(self._change_took, 3)}
        self.stages.append({"density": density_of(self.carry[0]), "steps": self._taken, **seconds})
        self._taken, self._begun = 0, self.clock.steps

    def _stepped(self, carry: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        variables, opt_state = carry
        model = self._sparse if SPARSITY in variables else self._module  # dense before the first pruning
        of = lambda params: loss_fn(model, {**variables, "params": params}, x, y)
        grads, stats = jax.grad(of, has_aux=True)(variables["params"])
        updates, opt_state = self._tx.update(grads, opt_state, variables["params"])
        variables = {**variables, **stats, "params": optax.apply_updates(variables["params"], updates)}
        if not self._inside:
            return (variables, opt_state), state
        gradient = lambda dense: self._gradient_of(dense, variables, x, y)
        *carry, state = self._schedule.update(self._tx, variables, opt_state, state, gradient)
        return tuple(carry), state

    def _changed(self, carry: Any, state: Any, grads: Any) -> Any:
        # Without gradients nothing is due, and what the branch would do is of no account.
        gradient = lambda dense: jax.tree.map(jnp.zeros_like, dense) if grads is None else grads
        *carry, state = self._schedule.update(self._tx, *carry, state, gradient)
        return tuple(carry), state

    def _dense_gradient(self, variables: Any, x: jax.Array, y: jax.Array) -> Any:
        return self._gradient_of(msbp.densify(variables)["params"], variables, x, y)

    def _gradient_of(self, dense: Any, variables: Any, x: jax.Array, y: jax.Array) -> Any:
        rest = {name: tree for name, tree in variables.items() if name != SPARSITY}
        return jax.grad(lambda dense: loss_fn(self._module, {**rest, "params": dense}, x, y)[0])(dense)


def _random(task: Task, variables: Any, key: jax.Array) -> Any:
    """Return variables with a random pattern, values scaled up to what the fewer inputs need."""
    variables = msbp.prune(variables, density=task.density, method="random", key=key, **task.pruning)
    for layer, patterns in variables[SPARSITY].items():
        scaled = variables["params"][layer]["kernel"] / patterns["kernel"].density ** 0.5
        variables["params"][layer] = {**variables["params"][layer], "kernel": scaled}
    return variables


@functools.partial(jax.jit, static_argnums=0)
def _right(module: Any, variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return (jnp.asarray(module.apply(variables, x)).argmax(-1) == y).mean()
