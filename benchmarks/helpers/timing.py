"""Interleaved timing: every candidate in every round, so that a drift of the machine hits all of them alike.

A candidate is called twice in a round and the second call counts: what ran before it, and how it left the caches and
the allocator, is then no part of the figure, as it is not in a training loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

type Timed = Callable[[], float]  # makes one call and returns its seconds


def timed(function: Callable[..., Any], *arguments: Any) -> Timed:
    """Return a timed call of a JAX function; it ends when the results are ready."""

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - start

    return call


def training(step: Callable[..., Any], state: Any, *batch: Any) -> Timed:
    """Return a timed call of one compiled training step, which donates the state and keeps the new one.

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

    return timed(call)


def medians(calls: Mapping[str, Timed], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Return the median milliseconds of each call.

    Args:
      calls: The candidates.
      rounds: Calls of each that count.
      warm_up: Calls before them that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            call()
            took = call()
            if number >= warm_up:
                seconds[name].append(took)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
