"""Backward of a convolution, dense over sparse, for layers of a ResNet-18: selection with memory, dx and dw."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import msbp_jax as msbp
from benchmarks.timing import Timed, medians, timed

BATCH = 32
SHAPES = ((56, 64), (28, 128), (14, 256))  # height and width, channels in and out
DENSITIES = (0.25, 0.1)
GROUPS: dict[str, int | str | None] = {"batch": None, "image": "example", "128": 128}


def convolution(w: jax.Array, x: jax.Array) -> jax.Array:
    """Return a 3 x 3 convolution, stride 1, as all but the first of each stage's are."""
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return, for each layer and density, the time of the dense backward over that of each group size."""
    table = []
    for size, channels in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x, g = (jax.random.normal(key, (BATCH, size, size, channels)) for key in keys[:2])
        w = jax.random.normal(keys[2], (3, 3, channels, channels)) / (9 * channels) ** 0.5
        for density in DENSITIES:
            calls: dict[str, Timed] = {
                "dense": timed(jax.jit(lambda w, x, g: jax.vjp(convolution, w, x)[1](g)), w, x, g)
            }
            for name, group in GROUPS.items():
                s = msbp.memorized(msbp.top_k(density=density, rows_per_group=group), decay=0.8)
                calls[name] = timed(jax.jit(_backward(s, w, x)), w, x, g)
            ms = medians(calls, rounds, warm_up=1)
            row: dict[str, Any] = {"layer": f"{BATCH} x {size} x {size} x {channels}, 3 x 3", "density": density}
            row["dense_ms"] = round(ms["dense"], 1)
            table.append(row | {f"dense/sparse {name}": round(ms["dense"] / ms[name], 2) for name in GROUPS})
            print(table[-1], flush=True)
    return table


def _backward(sparsifier: msbp.Sparsifier, w: jax.Array, x: jax.Array) -> Any:
    f = msbp.sparse_vjp(convolution, sparsifier)
    memory = f.init_memory(w, x)

    def backward(w: jax.Array, x: jax.Array, g: jax.Array) -> Any:
        # A loss whose gradient at the output is g: value_and_grad returns the new memory, too.
        loss = lambda p, m: jnp.vdot(f(p["w"], p["x"], memory=m), g)
        return msbp.value_and_grad(loss)({"w": w, "x": x}, memory)[1:]

    return backward
