"""Backward of one layer with the unbiased methods, drawing included: sampled rows, and dithering, also in 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import msbp_jax as msbp
from benchmarks.accelerator.layers import arrays
from benchmarks.accelerator.setting import Setting, milliseconds
from benchmarks.helpers.records import Row
from msbp_jax import kernels

METHODS = {
    "rows 1/16": msbp.sample_rows(density=1 / 16),
    "rows 1/4": msbp.sample_rows(density=1 / 4),
    "rows 1/2": msbp.sample_rows(density=1 / 2),
    "dithered 4": msbp.dithered(4),
    "dithered 4, 8 bits": msbp.dithered(4, bits=8),
}


def measure(setting: Setting) -> Iterator[Row]:
    """Yield, for each layer and method, the time of a dense backward over that of drawing and of both products."""
    for shape in setting.shapes:
        g, x, w = arrays(*shape, jnp.bfloat16)
        # Rows as different as those of a task that is being learned.
        g = g * jnp.exp(2 * jax.random.normal(jax.random.key(1), (shape[0], 1), g.dtype))
        calls: dict[str, Callable[[], Any]] = {"dense": functools.partial(jax.jit(_dense), g, x, w)}
        for name in setting.unbiased:
            sparsifier = METHODS[name]
            state = sparsifier.init(jax.ShapeDtypeStruct(g.shape, g.dtype))
            p, _ = jax.jit(sparsifier.apply)(g, state)
            calls[f"{name} drawn"] = functools.partial(jax.jit(sparsifier.apply), g, state)
            calls[f"{name} products"] = functools.partial(jax.jit(_products), p, x, w)
            whole = functools.partial(_whole, sparsifier.apply)
            calls[name] = functools.partial(jax.jit(whole), g, state, x, w)
        found = milliseconds(calls, setting)
        for name in setting.unbiased:
            row: Row = {"layer": "x".join(map(str, shape)), "method": name, "dense, ms": round(found["dense"], 3)}
            row["drawing, ms"] = round(found[f"{name} drawn"], 3)
            row["dense/products"] = round(found["dense"] / found[f"{name} products"], 2)
            yield row | {"dense/whole": round(found["dense"] / found[name], 2)}


def _dense(g: jax.Array, x: jax.Array, w: jax.Array) -> Any:
    return jax.vjp(jnp.matmul, x, w)[1](g)


def _products(p: msbp.Format, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    return kernels.grad_input(p, w, 1, dtype=x.dtype), kernels.grad_weight(p, x, 1, dtype=x.dtype)


def _whole(draw: Callable[..., Any], g: jax.Array, state: Any, x: jax.Array, w: jax.Array) -> Any:
    p, after = draw(g, state)
    return _products(p, x, w), after
