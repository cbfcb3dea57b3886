"""Where the time of a layer's backward goes: selection, dx and dw by themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.layers import arrays
from benchmarks.accelerator.setting import Setting, milliseconds
from benchmarks.helpers.backends import compiled
from benchmarks.helpers.records import Row
from msbp_jax import kernels


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the milliseconds of each op of a layer, by backend, beside reading g once and turning w."""
    shape = setting.shapes[0]
    g, x, w = arrays(*shape, jnp.bfloat16)
    memory = jnp.zeros(shape[2])
    names = [name for name in compiled("grad_input") if name in ("gpu", "tpu", "xla")]
    for density in setting.densities:
        k = round(density * shape[2])
        for group in (group for group in setting.groups if group != 1):
            calls: dict[str, Callable[[], Any]] = {
                "read g": functools.partial(jax.jit(lambda g: jnp.abs(g).sum(axis=0)), g),
                "turn w": functools.partial(jax.jit(lambda w: w.T + jnp.bfloat16(0)), w),
            }
            for name in names:
                select = jax.jit(functools.partial(_select, k, group, name))
                p = select(g, memory)[0]
                calls[f"select, {name}"] = functools.partial(select, g, memory)
                calls[f"dx, {name}"] = functools.partial(jax.jit(functools.partial(_dx, name)), p, w)
                calls[f"dw, {name}"] = functools.partial(jax.jit(functools.partial(_dw, name)), p, x)
            found = milliseconds(calls, setting)
            row: Row = {"layer": "x".join(map(str, shape)), "density": density, "r": group or "all"}
            yield row | {name: round(value, 3) for name, value in found.items()}


def _select(k: int, group: int | None, backend: str, g: jax.Array, memory: jax.Array) -> Any:
    return kernels.select_with_memory(g, memory, k, group, backend=backend)


def _dx(backend: str, p: Any, w: jax.Array) -> jax.Array:
    return kernels.grad_input(p, w, 1, dtype=w.dtype, backend=backend)


def _dw(backend: str, p: Any, x: jax.Array) -> jax.Array:
    return kernels.grad_weight(p, x, 1, dtype=x.dtype, backend=backend)
