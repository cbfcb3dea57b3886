"""Interleaved timing: every candidate once a round, so that a drift of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def medians(candidates: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Return the median seconds of a call of each candidate.

    Args:
      candidates: Functions that return arrays; a call ends when they are ready.
      rounds: Calls that count.
      warm_up: Calls before them that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def training(step: Callable[..., Any], state: Any, *batch: Any) -> Callable[[], Any]:
    """Return a call that makes one training step, donating the state, and keeps the new one for the next call."""
    compiled = jax.jit(step, donate_argnums=0)
    carry = [jax.tree.map(lambda leaf: leaf.copy() if hasattr(leaf, "copy") else leaf, state)]

    def call() -> Any:
        carry[0], value = compiled(carry[0], *batch)
        return carry[0], value

    return call
