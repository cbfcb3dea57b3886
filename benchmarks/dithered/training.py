"""A training run over epochs, and what its gradients were like: zeros of each layer, clipped levels, accuracy.

Steps and batches of tests are taken one by one: in a loop of XLA's a CPU's convolutions take many times as long.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.dithered.networks import Task
from benchmarks.helpers.accuracy import percent_right
from benchmarks.helpers.networks import Setting, problem


def train(task: Task, plan: msbp.Sparsifier | None, seed: int) -> dict[str, Any]:
    """Return loss, accuracy and what the states tell after every epoch.

    Args:
      task: What is trained.
      plan: What the backward propagates; None for plain JAX.
      seed: Of parameters, order and noise.
    """
    x, y = task.train
    params = task.module.init(jax.random.key(seed), x[:1])["params"]
    gradients, _, memory = problem(Setting("", task.module, x[: task.batch], y[: task.batch], 1), plan)
    memory = reseeded(memory, seed)

    def step(state: Any, rows: jax.Array) -> tuple[Any, tuple[jax.Array, dict[str, jax.Array]]]:
        params, memory, opt_state = state
        loss, grads, memory = gradients(params, memory, x[rows], y[rows])
        updates, opt_state = task.optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), memory, opt_state), (loss, msbp.metrics(memory))

    taken = jax.jit(step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, (params, memory, task.optimizer.init(params)))
    draw, steps = np.random.default_rng(seed), len(y) // task.batch
    found: dict[str, Any] = {"loss": [], "accuracy": [], "told": []}
    for _ in range(task.epochs):
        order = draw.permutation(len(y))[: steps * task.batch].reshape(steps, task.batch)
        told = []
        for rows in jnp.asarray(order):
            state, one = taken(state, rows)
            told.append(one)
        loss, means = jax.tree.map(lambda *values: round(float(np.mean(values)), 5), *told)
        found["loss"].append(loss)
        found["accuracy"].append(round(accuracy(task, state[0]), 3))
        found["told"].append(means)
    return found


def accuracy(task: Task, params: Any) -> float:
    """Return how much of the test set is told right, in percent."""
    return percent_right(task.module, {"params": params}, *task.test)


def reseeded(memory: Any, seed: int) -> Any:
    """Return a memory whose keys another seed made."""
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: jax.random.fold_in(leaf, seed) if is_key(leaf) else leaf, memory)
