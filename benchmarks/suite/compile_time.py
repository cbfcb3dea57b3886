"""Tracing and compiling the step of a 12-layer MLP, sparse over dense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import jax
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import MLP, Setting, problem, small, step_of
from benchmarks.helpers.records import Row
from benchmarks.suite.context import Context


def deep() -> Setting:
    """Return an MLP of twelve hidden layers."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = jax.random.normal(keys[0], (256, 784)), jax.random.randint(keys[1], (256,), 0, 10)
    return Setting("784-(512 x 12)-10", MLP(512, 13), x, y, 128)


def measure(context: Context) -> Iterator[Row]:
    """Yield the ratios of medians, caches cleared before each."""
    setting = small() if context.small else deep()
    x, y = setting.x, setting.y
    methods = {
        "dense": None,
        "MSBP": msbp.memorized(msbp.top_k(density=0.04, rows_per_group=setting.rows_per_group), decay=0.8),
    }
    tx = optax.adam(1e-3)
    tracing: dict[str, list[float]] = {name: [] for name in methods}
    total: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(context.rounds):
        for name, sparsifier in methods.items():
            gradients, params, memory = problem(setting, sparsifier)
            state = (params, memory, tx.init(params))
            if not context.small:  # what else this process has compiled is kept
                jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(step_of(tx, gradients)).lower(state, x, y)
            tracing[name].append(time.perf_counter() - start)
            lowered.compile()
            total[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times) for name, times in total.items()}
    traced = {name: statistics.median(times) for name, times in tracing.items()}
    row: Row = {"network": setting.name, **{f"{name}_s": round(t, 2) for name, t in seconds.items()}}
    row["MSBP/dense"] = round(seconds["MSBP"] / seconds["dense"], 2)
    row["tracing MSBP/dense"] = round(traced["MSBP"] / traced["dense"], 2)
    yield row
