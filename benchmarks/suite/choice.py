"""Where each path of the products pays, and whether the automatic choice takes the right one.

Every path runs on a grid of shapes; the table says what the choice would have been and what that costs over the best.
With `--fit`, the coefficients of `msbp_jax/kernels/choice/cpu.py` are fitted to it (non-negative least squares of the
relative error) and printed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.helpers import gradients
from benchmarks.helpers.backends import compiled
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import medians, timed
from benchmarks.suite.context import SMALL, Context, Grid
from benchmarks.suite.layers import arrays, dense_backward
from msbp_jax import kernels
from msbp_jax.kernels.choice import cpu
from msbp_jax.kernels.choice.advice import expected_speed_up
from msbp_jax.kernels.choice.layer import Layer
from msbp_jax.kernels.choice.order import fastest_first

GRID = Grid(
    shapes=(
        (16, 64, 64),
        (32, 128, 128),
        (128, 128, 128),
        (128, 512, 512),
        (32, 1024, 1024),
        (1024, 256, 256),
        (1024, 1024, 1024),
        (128, 2048, 512),
        (512, 512, 2048),
        (1024, 64, 1024),
    ),
    densities=(0.01, 0.04, 0.1, 0.25, 0.5, 0.8),
    groups={"1": 1, "4": 4, "10": 10, "32": 32, "all": None},
)


def products(p: Any, x: jax.Array, w: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
    """Return (dx, dw) by one backend."""
    return kernels.grad_input(p, w, 1, backend=backend), kernels.grad_weight(p, x, 1, backend=backend)


def measure(context: Context) -> Iterator[Row]:
    """Yield the time of each path on the grid, and of the chosen one over the best."""
    grid, backends = SMALL if context.small else GRID, compiled("grad_input")
    for rows, m, n in grid.shapes:
        (x, w), g = arrays(rows, m, n), gradients.heavy_tailed(rows, n)
        for group in grid.groups.values():
            for density in grid.densities:
                if group is not None and group > rows:
                    continue
                k = max(1, round(density * n))
                select = jax.jit(functools.partial(kernels.select, k=k, rows_per_group=group))
                p = select(g)
                calls = {"plain": timed(jax.jit(dense_backward), x, w, g), "select": timed(select, g)}
                for backend in backends:
                    if backend == "xla" and group is not None and group < 32 and rows * k * m > 2**25:
                        continue  # ten times slower than the others: known
                    function = jax.jit(functools.partial(products, backend=backend))
                    calls[backend] = timed(function, p, x, w)
                ms = medians(calls, context.rounds if rows * m * n < 2**28 else max(5, context.rounds // 2))
                layer = Layer(rows, m, n, k, min(group or rows, rows))
                chosen = fastest_first(layer)[0]
                best = min(ms[backend] for backend in backends if backend in ms)
                row: Row = {"rows": rows, "in": m, "out": n, "k": k, "r": layer.rows_per_group}
                row |= {f"{name}_ms": round(t, 3) for name, t in ms.items()}
                row |= {"chosen": chosen, "chosen/best": round(ms.get(chosen, np.inf) / best, 2)}
                row["dense/sparse"] = round(ms["plain"] / (ms["select"] + ms.get(chosen, np.inf)), 2)
                row["expected"] = round(expected_speed_up(layer), 2)
                yield row


def fit(table: list[Row]) -> dict[str, tuple[float, ...]]:
    """Return the coefficients of each path that fit the table best."""
    from scipy.optimize import nnls

    out = {}
    for kind in cpu.COEFFICIENTS:
        units, times = [], []
        for row in table:
            layer = Layer(row["rows"], row["in"], row["out"], row["k"], row["r"])
            select = "select, native" if "native_ms" in row else "select, xla"
            for name in ("native", "xla", "dense", "plain", "select"):
                this = select if name == "select" else cpu.kind_of(name, row["k"], row["r"])
                if this == kind and f"{name}_ms" in row:
                    units.append(cpu.work(kind, layer))
                    times.append(row[f"{name}_ms"] / 1e3)
        if not times:
            continue
        relative = np.array(units, float) / np.array(times)[:, None]
        weights = np.ones(len(times))
        scale = relative.max(axis=0)
        for _ in range(10):  # towards the least absolute error, which outliers pull less
            found = nnls(relative / scale * weights[:, None], weights)[0] / scale
            weights = 1 / np.sqrt(np.maximum(np.abs(relative @ found - 1), 0.05))
        out[kind] = tuple(float(f"{c:.3g}") for c in found)
    return out
