"""The selection alone: how it compares with reading the gradient once, `sum(abs(g))` in XLA."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.helpers import gradients
from benchmarks.helpers.backends import compiled
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed
from benchmarks.suite.context import Context, layers
from msbp_jax import kernels


def measure(context: Context) -> Iterator[Row]:
    """Yield the time of select over that of `sum(abs(g))` in XLA, for each kind of gradient."""
    grid, backends = layers(context), compiled("select")
    total = jax.jit(lambda g: jnp.abs(g).sum())
    for rows, _, n in grid.shapes:
        k, memory = max(1, round(0.04 * n)), jnp.zeros(n)
        selections: dict[str, tuple[Any, tuple[jax.Array, ...]]] = {}
        for name, group in grid.groups.items():
            for backend in backends:
                if backend == "xla" and rows > 2048:
                    continue
                how: dict[str, Any] = {"k": k, "rows_per_group": group, "backend": backend}
                selections[f"{backend} {name}"] = jax.jit(functools.partial(kernels.select, **how)), ()
                with_memory = jax.jit(functools.partial(kernels.select_with_memory, **how))
                selections[f"{backend} {name} with memory"] = with_memory, (memory,)
        for kind in gradients.KINDS:
            g = gradients.make(kind, rows, n, context.data)
            calls: dict[str, Timed] = {"sum": timed(total, g)}
            calls |= {name: timed(select, g, *rest) for name, (select, rest) in selections.items()}
            ms = medians(calls, context.rounds)
            for name in grid.groups:
                row: Row = {"rows x n": f"{rows}x{n}", "gradient": kind, "r": name}
                row["sum_ms"] = round(ms["sum"], 3)
                for backend in backends:
                    for memory_too in ("", " with memory"):
                        if (call := f"{backend} {name}{memory_too}") in ms:
                            row[f"{backend}{memory_too}/sum"] = round(ms[call] / ms["sum"], 2)
                yield row
