"""Several workers, each with its part of the batch and noise of its own, on virtual devices: what each would send.

A gradient that is the mean of N dithered ones has an N-th of their variance, so that the step may grow as sqrt(N) at
the same noise. What a worker sends is its dw: the share of it that is exactly 0, and its entropy in bits an entry,
rounded to bfloat16, which a perfect code of single entries would reach.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import msbp_jax as msbp
from benchmarks.dithered.networks import Task
from benchmarks.dithered.training import accuracy, reseeded
from benchmarks.helpers.networks import Setting, problem


def train(task: Task, scale: float | None, workers: int, batch: int, seed: int) -> dict[str, Any]:
    """Return accuracy, and zeros and entropy of what workers send, after every epoch.

    Args:
      task: What is trained.
      scale: Of dithering, None for plain JAX.
      workers: Among how many the batch is divided.
      batch: Examples of a step, of all of them together.
      seed: Of parameters, order and noise.
    """
    x, y = task.train
    own = batch // workers
    params = task.module.init(jax.random.key(seed), x[:1])["params"]
    plan = None if scale is None else msbp.dithered(scale)
    gradients, _, start = problem(Setting("", task.module, x[:own], y[:own], 1), plan)
    memories = [reseeded(start, 1000 * seed + i) for i in range(workers)]
    memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *memories)
    mesh = jax.make_mesh((workers,), ("workers",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("workers"))

    def step(state: Any, rows: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, memory, opt_state = state
        mine = jax.lax.with_sharding_constraint((x[rows], y[rows]), spread)
        losses, grads, memory = jax.vmap(gradients, in_axes=(None, 0, 0, 0))(params, memory, *mine)
        sent = jnp.concatenate([leaf.reshape(workers, -1) for leaf in jax.tree.leaves(grads)], axis=1)
        zeros = (sent == 0).mean()
        mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), grads)
        updates, opt_state = task.optimizer.update(mean, opt_state, params)
        density = [jnp.mean(leaf) for name, leaf in msbp.metrics(memory).items() if name.endswith("density")]
        kept = jnp.mean(jnp.stack(density)) if density else jnp.ones(())
        state = optax.apply_updates(params, updates), memory, opt_state
        return state, (jnp.stack([losses.mean(), zeros, kept]), sent[0])

    def epoch(state: Any, order: jax.Array) -> Any:
        def told_only(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            state, (told, _) = step(state, rows)
            return state, told

        state, told = jax.lax.scan(told_only, state, order[:-1])
        state, (_, last) = step(state, order[-1])
        return state, told.mean(axis=0), last

    run = jax.jit(epoch, donate_argnums=0)
    state = jax.device_put((params, memory, task.optimizer.init(params)), NamedSharding(mesh, P()))
    state = jax.tree.map(jnp.copy, (state[0], jax.device_put(memory, spread), state[2]))
    draw, steps = np.random.default_rng(seed), len(y) // batch
    found: dict[str, Any] = {"loss": [], "accuracy": [], "zeros_of_p": [], "zeros_of_dw": [], "bits_of_dw": []}
    for _ in range(task.epochs):
        order = draw.permutation(len(y))[: steps * batch].reshape(steps, workers, own)
        state, (loss, zeros, kept), last = run(state, jnp.asarray(order))
        found["loss"].append(round(float(loss), 5))
        found["accuracy"].append(round(accuracy(task, jax.device_put(state[0], jax.devices()[0])), 3))
        found["zeros_of_p"].append(round(1 - float(kept), 4))
        found["zeros_of_dw"].append(round(float(zeros), 4))
        found["bits_of_dw"].append(round(entropy(np.asarray(last.astype(jnp.bfloat16).view(jnp.uint16))), 3))
    return found


def entropy(symbols: np.ndarray) -> float:
    """Return the entropy of symbols, in bits each."""
    shares = np.unique(symbols, return_counts=True)[1] / symbols.size
    return float(-(shares * np.log2(shares)).sum())
