"""One run: a method, a learning rate, a seed, and a budget of seconds over which the rate is decayed to 0.

The clock runs while steps do, and stands while the test set is looked at; compiling comes before. The rate follows the
clock (or the examples, where they are seen but once), a half cosine, so that every method ends its decay when its time
is over, however many steps that is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import density_of
from benchmarks.time_to_accuracy.methods import Method
from benchmarks.time_to_accuracy.tasks import Batch, Task

LOOKS = 12  # at the test set, in a run
_CHUNKS = 96  # of a run, about: a chunk is the steps between two looks at the clock


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a run stands.

    Attributes:
      seconds: Of training.
      examples: Seen so far.
      loss: Mean of the training loss since the point before.
      accuracy: On the test set, in percent.
      density: Mean share of the rows kept since the point before; 1 where none are sampled.
    """

    seconds: float
    examples: int
    loss: float
    accuracy: float
    density: float


class Trainer:
    """A task and a method, compiled once for all rates, seeds and budgets."""

    def __init__(self, task: Task, method: Method) -> None:
        self.task = task
        self.batch = max(1, round(task.batch * method.share))
        some = {name: array[: self.batch] for name, array in task.train.items()}
        self._init: Callable[[jax.Array], Any] = jax.jit(
            lambda key: task.module.init(key, *task.inputs(some))["params"]
        )
        self._tx = optax.inject_hyperparams(task.optimizer)(1e-3)
        params = self._init(jax.random.key(0))
        self._gradients, self._memory = self._differentiated(method, params, some)
        self._settled_density = method.density
        self._right = jax.jit(
            lambda params, batch: task.right(task.module.apply({"params": params}, *task.inputs(batch)), batch)
        )
        self._step_seconds = 0.0
        self._compiled: dict[int, Any] = {}
        self._accuracy(params, task.test)
        self._step_seconds = self._measured(params)

    def run(self, rate: float, seed: int, budget: float) -> Iterator[Point]:
        """Train, and yield where it stands from time to time, the last time at the end."""
        state = self._start(self._init(jax.random.key(seed)))
        steps = max(1, round(budget / _CHUNKS / self._step_seconds))
        chunk = self._chunk(steps, state)
        draw, order = np.random.default_rng(seed), np.zeros(0, np.int64)
        per_chunk, taken, epochs = steps * self.batch, 0, 0
        seconds, looks, losses, densities = 0.0, 0, [], []
        over = False
        while not over:
            while len(order) < per_chunk:
                epochs += 1
                order = np.concatenate([order, draw.permutation(self.task.examples)])
            now, order = order[:per_chunk].reshape(steps, self.batch), order[per_chunk:]
            passed = min(1.0, max(seconds / budget, taken / self._limit if self._limit else 0.0))
            lr = jnp.asarray(rate * 0.5 * (1 + math.cos(math.pi * passed)), jnp.float32)
            rows = jnp.asarray(now)
            begun = time.perf_counter()
            state, loss, density = jax.block_until_ready(chunk(state, rows, lr))
            seconds += time.perf_counter() - begun
            taken += per_chunk
            losses.append(float(loss))
            densities.append(float(density))
            over = seconds >= budget or bool(self._limit and taken + per_chunk > self._limit)
            if over or seconds >= budget * (looks + 1) / LOOKS:
                looks = int(seconds / budget * LOOKS)
                accuracy = self._accuracy(state[0], self.task.test)
                yield Point(seconds, taken, float(np.mean(losses)), accuracy, float(np.mean(densities)))
                losses, densities = [], []

    @property
    def _limit(self) -> int:
        """How many examples may be seen; 0 for any number."""
        return (self.task.epochs or 0) * self.task.examples

    def _start(self, params: Any) -> Any:
        return jax.tree.map(jnp.copy, (params, self._memory, self._tx.init(params)))

    def _chunk(self, steps: int, state: Any) -> Any:
        size = steps if self.task.in_loops else 1
        if size not in self._compiled:
            rows = jax.ShapeDtypeStruct((size, self.batch), jnp.int32)
            rate = jax.ShapeDtypeStruct((), jnp.float32)
            self._compiled[size] = jax.jit(self._steps, donate_argnums=0).lower(state, rows, rate).compile()
        return self._compiled[size] if self.task.in_loops else functools.partial(_one_by_one, self._compiled[size])

    def _steps(self, state: Any, rows: jax.Array, rate: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        def step(state: Any, rows: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            params, memory, opt_state = state
            batch = {name: array[rows] for name, array in self.task.train.items()}
            loss, grads, memory = self._gradients(params, memory, batch)
            opt_state = opt_state._replace(hyperparams=opt_state.hyperparams | {"learning_rate": rate})
            updates, opt_state = self._tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), memory, opt_state), (loss, self._density(memory))

        if not self.task.in_loops:
            state, told = step(state, rows[0])
            return state, *told
        state, (losses, densities) = jax.lax.scan(step, state, rows)
        return state, losses.mean(), densities.mean()

    def _density(self, memory: Any) -> jax.Array:
        settled = self._settled_density
        return density_of(memory) if settled is None else jnp.asarray(settled, jnp.float32)

    def _measured(self, params: Any) -> float:
        """Return about how long a step takes."""
        state, steps = self._start(params), 2
        rows = jnp.zeros((steps, self.batch), jnp.int32) + jnp.arange(self.batch) % self.task.examples
        chunk, seconds = self._chunk(steps, state), []
        for _ in range(3):
            begun = time.perf_counter()
            state, *_ = jax.block_until_ready(chunk(state, rows, jnp.zeros((), jnp.float32)))
            seconds.append((time.perf_counter() - begun) / steps)
        return min(seconds)

    def _differentiated(self, method: Method, params: Any, some: Batch) -> tuple[Callable[..., Any], Any]:
        task = self.task
        if method.plan is None:

            def plain(params: Any, memory: Any, batch: Batch) -> tuple[jax.Array, Any, Any]:
                of_params = lambda params: task.loss(task.module.apply({"params": params}, *task.inputs(batch)), batch)
                return *jax.value_and_grad(of_params)(params), memory

            return plain, {}
        model = msbp.sparse_vjp(task.module, method.plan)

        def loss(params: Any, memory: Any, batch: Batch) -> jax.Array:
            return task.loss(model.apply({"params": params}, *task.inputs(batch), memory=memory), batch)

        return msbp.value_and_grad(loss), model.init_memory({"params": params}, *task.inputs(some))

    def _accuracy(self, params: Any, test: Batch) -> float:
        size = min(1000, len(next(iter(test.values()))))
        parts = len(next(iter(test.values()))) // size
        right, told = 0.0, 0.0
        for part in range(parts):
            batch = {name: array[part * size : (part + 1) * size] for name, array in test.items()}
            found = self._right(params, batch)
            right, told = right + float(found[0]), told + float(found[1])
        return 100 * right / told


def _one_by_one(step: Callable[..., Any], state: Any, rows: jax.Array, rate: jax.Array) -> tuple[Any, float, float]:
    """Take steps one call at a time; return the state, and the means of loss and density."""
    seen = []
    for row in rows[:, None]:
        state, *told = step(state, row, rate)
        seen.append(told)
    losses, densities = np.mean(jax.device_get(seen), axis=0)
    return state, losses, densities
