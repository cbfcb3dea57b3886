"""Step and backward times of the methods, interleaved, so that a drift of the machine hits all of them alike.

A step is everything between two batches: loss, gradients, optimizer. Its backward is what the gradients cost beyond the
loss: the median of `value_and_grad` less the median of the forward, both on the same batch in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msbp_jax.demo.data import Dataset
from msbp_jax.demo.model import MLP, Gradients

ROUNDS = 21
WARM_UP = 3

Problem = tuple[Gradients, optax.GradientTransformation, Any, Any]


def measure(
    problems: Mapping[str, Problem], module: MLP, data: Dataset, batch: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median milliseconds of a step, and of a backward, for each method.

    Args:
      problems: Gradient function, optimizer, parameters and memory of each method.
      module: The network.
      data: Where the batch comes from.
      batch: Its size.
    """
    x, y = jnp.asarray(data.train_x[:batch]), jnp.asarray(data.train_y[:batch])

    @jax.jit
    def forward(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = module.apply({"params": params}, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    calls: dict[str, Callable[[], Any]] = {}
    for name, problem in problems.items():
        calls[f"step {name}"] = _training_step(problem, x, y)
        gradients, _, params, memory = problem
        calls[f"gradients {name}"] = _call(jax.jit(gradients), params, memory, x, y)
    calls["forward"] = _call(forward, next(iter(problems.values()))[2], x, y)
    ms = {name: 1e3 * seconds for name, seconds in medians(calls, ROUNDS).items()}
    steps = {name: ms[f"step {name}"] for name in problems}
    return steps, {name: max(0.0, ms[f"gradients {name}"] - ms["forward"]) for name in problems}


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _training_step(problem: Problem, x: jax.Array, y: jax.Array) -> Callable[[], Any]:
    gradients, tx, params, memory = problem

    def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        params, memory, opt_state = state
        loss, grads, memory = gradients(params, memory, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), memory, opt_state), loss

    return training(step, (params, memory, tx.init(params)), x, y)


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = WARM_UP) -> dict[str, float]:
    """Return the median seconds of each call, every one of them once a round.

    Args:
      calls: Functions that return arrays; a call ends when they are ready.
      rounds: Calls that count.
      warm_up: Calls before them that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def training(step: Callable[..., Any], state: Any, *batch: Any) -> Callable[[], Any]:
    """Return a call that makes one compiled training step, donates the state, and keeps the new one for the next call.

    Args:
      step: `step(state, *batch) -> (state, value)`.
      state: Where it starts; copied.
      *batch: The same for every step.
    """
    compiled = jax.jit(step, donate_argnums=0)
    carried = [jax.tree.map(jnp.copy, state)]

    def call() -> Any:
        carried[0], value = compiled(carried[0], *batch)
        return carried[0], value

    return call
