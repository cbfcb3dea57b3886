"""What it costs that Flax stores a weight `[in, out]`, where the features that are kept are not contiguous rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax

from benchmarks.helpers import gradients
from benchmarks.helpers.backends import compiled
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed
from benchmarks.suite.context import Context, layers
from benchmarks.suite.layers import arrays
from msbp_jax import kernels


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each layer and group size, the time of both products over that with a weight stored `[out, in]`."""
    grid = layers(context)
    for rows, m, n in grid.shapes:
        x, w = arrays(rows, m, n)
        k = max(1, round(0.04 * n))
        for name, group in grid.groups.items():
            p = jax.jit(functools.partial(kernels.select, k=k, rows_per_group=group))(gradients.gaussian(rows, n))
            calls: dict[str, Timed] = {}
            for backend in compiled("grad_input"):
                if backend == "dense" or (backend == "xla" and group == 1):
                    continue
                for axis, oriented in ((1, w), (0, w.T.copy())):
                    dx = jax.jit(functools.partial(kernels.grad_input, feature_axis=axis, backend=backend))
                    dw = jax.jit(functools.partial(kernels.grad_weight, feature_axis=axis, backend=backend))
                    calls[f"{backend} dx {axis}"] = timed(dx, p, oriented)
                    calls[f"{backend} dw {axis}"] = timed(dw, p, x)
            ms = medians(calls, context.rounds)
            row: Row = {"rows x in x out": f"{rows}x{m}x{n}", "r": name}
            for backend in ("native", "xla"):
                for product in ("dx", "dw"):
                    if f"{backend} {product} 1" in ms:
                        ratio = ms[f"{backend} {product} 1"] / ms[f"{backend} {product} 0"]
                        row[f"{backend} {product}: [in, out] / [out, in]"] = round(ratio, 2)
            yield row
