"""Backward of one layer (selection with memory, dx, dw): dense XLA, XLA's sparse path, the kernels, what is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.rates import floor
from benchmarks.accelerator.setting import Setting, milliseconds
from benchmarks.helpers.backends import compiled
from benchmarks.helpers.records import Row
from msbp_jax import kernels


def backward(
    k: int, group: int | None, backend: str | None, g: jax.Array, x: jax.Array, w: jax.Array, memory: jax.Array
) -> Any:
    """Return dx, dw and what is left for the memory of a layer."""
    p, left, rows = kernels.select_with_memory(g, memory, k, group, backend=backend)
    dx = kernels.grad_input(p, w, 1, dtype=x.dtype, backend=backend)
    dw = kernels.grad_weight(p, x, 1, dtype=x.dtype, backend=backend)
    return dx, dw, left, rows


def arrays(rows: int, m: int, n: int, dtype: Any) -> list[jax.Array]:
    """Return g, x and w of a layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, n), (rows, m), (m, n)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def measure(setting: Setting, rates: Mapping[str, float]) -> Iterator[Row]:
    """Yield, for each layer, the time of dense over that of each path, and of each path over the floor."""
    pallas = [
        name for name in compiled("grad_input") if name in ("gpu", "tpu")
    ]  # none on a CPU, where they are interpreted
    dense = jax.jit(lambda g, x, w: jax.vjp(jnp.matmul, x, w)[1](g))
    for shape in setting.shapes:
        g, x, w = arrays(*shape, jnp.bfloat16)
        memory = jnp.zeros(shape[2])
        for density in setting.densities:
            k = round(density * shape[2])
            least = floor(*shape, k, rates)
            for group in setting.groups:
                named = pallas if group == 1 else ["xla", *pallas]  # XLA gathers each row's weights: minutes
                calls: dict[str, Callable[[], Any]] = {"dense": functools.partial(dense, g, x, w)}
                for name in (*named, "chosen"):
                    backend = None if name == "chosen" else name
                    function = jax.jit(functools.partial(backward, k, group, backend))
                    calls[name] = functools.partial(function, g, x, w, memory)
                found = milliseconds(calls, setting)
                row: Row = {"layer": "x".join(map(str, shape)), "density": density, "r": group or "all"}
                row |= {"dense, ms": round(found["dense"], 3), "floor, ms": round(least, 3)}
                row |= {f"dense/{name}": round(found["dense"] / found[name], 2) for name in (*named, "chosen")}
                row["chosen/floor"] = round(found["chosen"] / least, 2)
                yield row
