"""What page faults cost a step: with freed memory kept by the process and without, each in processes of its own."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import resource
import statistics
from collections.abc import Iterator

import jax
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import MLP, Setting, problem, step_of
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import training
from benchmarks.suite.context import Context

SIZES = ((1024, 2048), (2048, 2048))  # rows, width
SMALL = ((16, 64),)
PROCESSES = 1  # of each kind
_WARM_UP = 2

type Found = dict[str, tuple[float, float]]  # of each method milliseconds and page faults, medians


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each size and method, a step without and with `keep_freed_memory`."""
    processes = 1 if context.small else PROCESSES
    for size in SMALL if context.small else SIZES:
        found: dict[bool, list[Found]] = {False: [], True: []}
        for _ in range(processes):
            for kept, results in found.items():
                results.append(_in_a_new_process(kept, size, context.rounds))
        for method in found[True][0]:
            given_back, held = (
                [statistics.median(result[method][what] for result in results) for what in (0, 1)]
                for results in (found[False], found[True])
            )
            yield {
                "network": f"MLP 784-({size[1]} x 2)-10, batch {size[0]}",
                "method": method,
                "step_ms": round(given_back[0], 1),
                "step_ms, kept": round(held[0], 1),
                "step/kept": round(given_back[0] / held[0], 2),
                "page faults a step": round(given_back[1]),
                "page faults a step, kept": round(held[1]),
            }


def _in_a_new_process(kept: bool, size: tuple[int, int], rounds: int) -> Found:
    spawn = multiprocessing.get_context("spawn")  # a fork would have the settings of this process
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_steps, kept, size, rounds).result()


def _steps(kept: bool, size: tuple[int, int], rounds: int) -> Found:
    """Return what steps take in this process."""
    if kept and not msbp.keep_freed_memory():
        raise RuntimeError("keep_freed_memory() says that nothing can be done here: measure on Linux with glibc.")
    rows, width = size
    keys = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(keys[0], (rows, 784)), jax.random.randint(keys[1], (rows,), 0, 10)
    setting = Setting(f"MLP {width}", MLP(width, 3), x, y, 128)
    top_k = msbp.memorized(msbp.top_k(density=0.04, rows_per_group=128), decay=0.8)
    methods = {"dense": None, "MSBP": top_k, "rows, 1/4": msbp.sample_rows(density=0.25)}
    tx, calls = optax.sgd(0.01), {}
    for method, plan in methods.items():
        gradients, params, memory = problem(setting, plan)
        calls[method] = training(step_of(tx, gradients), (params, memory, tx.init(params)), setting.x, setting.y)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    faults: dict[str, list[int]] = {method: [] for method in methods}
    for number in range(_WARM_UP + rounds):
        for method, call in calls.items():
            call()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            took = call()
            if number >= _WARM_UP:
                seconds[method].append(took)
                faults[method].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {method: (1e3 * statistics.median(seconds[method]), statistics.median(faults[method])) for method in calls}
