"""A data-parallel step, dense and by rows: eight virtual devices of one process, and two processes of one device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import socket
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import msbp_jax as msbp
from benchmarks.helpers.networks import MLP, Setting, problem, step_of
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import medians, timed
from benchmarks.suite.context import Context

SIZES = ((1024, 1024),)  # rows, width
SMALL = ((16, 64),)
PROCESSES = {"8 devices, 1 process": 1, "2 devices, 2 processes": 2}
_PLANS = {
    "dense": None,
    "rows, 1/4": (0.25, None),
    "rows, 1/16": (1 / 16, None),
    "rows, 1/4, xla": (0.25, "xla"),
    "rows, 1/16, xla": (1 / 16, "xla"),
}


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each size and kind of devices, dense steps over those by rows."""
    plans = ("dense", "rows, 1/4, xla") if context.small else tuple(_PLANS)
    for rows, width in SMALL if context.small else SIZES:
        for where, processes in PROCESSES.items():
            ms = _in_new_processes(processes, rows, width, context.rounds, plans)
            row: Row = {"network": f"MLP 784-({width} x 2)-10, batch {rows}", "devices": where}
            row["dense step_ms"] = round(ms["dense"], 1)
            yield row | {f"dense/{name}": round(ms["dense"] / ms[name], 2) for name in ms if name != "dense"}


def _in_new_processes(processes: int, *what: Any) -> dict[str, float]:
    """Return what the first of some processes measures, which work together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)) for _ in range(processes)
        ]
        found = [pool.submit(_steps, i, processes, address, *what) for i, pool in enumerate(pools)]
        results = [future.result() for future in found]
        return results.pop(0)


def _steps(
    process: int, processes: int, address: str, rows: int, width: int, rounds: int, plans: tuple[str, ...]
) -> dict[str, float]:
    """Return what steps take in this process, one of some."""
    msbp.keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 if processes == 1 else 1)
    if processes > 1:
        for name in [name for name in os.environ if "proxy" in name.lower()]:
            del os.environ[name]  # of this process: the other one is on this machine
        jax.distributed.initialize(address, num_processes=processes, process_id=process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(rows, 784)).astype(np.float32), draw.integers(0, 10, rows).astype(np.int32)
    batch = _placed(x, split), _placed(y, split)
    setting, tx = Setting("", MLP(width, 3), jax.numpy.asarray(x), jax.numpy.asarray(y), 1), optax.sgd(0.01)
    calls = {}
    for name in plans:
        what = _PLANS[name]
        plan = None if what is None else msbp.sample_rows(density=what[0])
        gradients, params, memory = problem(setting, plan, backend=what and what[1])
        state = jax.tree.map(lambda leaf: _placed(leaf, whole), (params, memory, tx.init(params)))
        # Without donation: results of a step are not the next one's arguments, so that all methods see one gradient.
        calls[name] = timed(jax.jit(step_of(tx, gradients)), state, *batch)
    found = medians(calls, rounds)
    if processes > 1:
        jax.distributed.shutdown()  # they wait for each other, and pools end one after the other
    return found


def _placed(leaf: Any, sharding: NamedSharding) -> Any:
    """Return an array that is known to all processes as one over all devices; keys by their bits."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_placed(jax.random.key_data(leaf), sharding))
    held = np.asarray(leaf)
    return jax.make_array_from_callback(held.shape, sharding, lambda at: held[at])
