"""A clock of a training run: what is computed, apart from what is compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


class Clock:
    """Seconds of calls, those in which something was compiled apart.

    Attributes:
      steps: Seconds of steps.
      compiling: Seconds of calls that compiled.
      programs: How many did.
    """

    def __init__(self) -> None:
        self.steps, self.compiling, self.programs = 0.0, 0.0, 0

    def call(self, compiled: Any, *arguments: Any) -> Any:
        """Call a compiled function and wait for it."""
        before, begun = compiled._cache_size(), time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        passed = time.perf_counter() - begun
        if compiled._cache_size() > before:
            self.compiling += passed
            self.programs += 1
        else:
            self.steps += passed
        return result

    def outside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call what runs outside of `jit`, and wait for it; all of it counts, what it compiles included."""
        begun = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        self.steps += time.perf_counter() - begun
        return result

    def told(self) -> dict[str, Any]:
        """Return what was measured."""
        return {
            "seconds": round(self.steps, 4),
            "compiling": round(self.compiling, 2),
            "programs": self.programs,
        }
