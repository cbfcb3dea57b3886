"""Making entries 0 by chance, and the products of the others, against dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import msbp_jax as msbp
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed
from benchmarks.suite.context import Context
from msbp_jax import kernels

SHAPES = ((1024, 1024, 1024), (128, 512, 512), (256, 512, 512), (2048, 512, 2048), (2048, 2048, 2048))
ZEROS = (0.5, 0.6, 0.7, 0.8, 0.92, 0.98)


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each shape and share of zeros, dense dx and dw over dithering and the products of what is left."""
    backend = "native" if "native" in kernels.backends()["grad_input"] else "xla"
    for rows, m, n in ((16, 24, 80),) if context.small else SHAPES:
        draw = np.random.default_rng(0)
        normal = lambda *shape, draw=draw: jnp.asarray(draw.normal(size=shape), jnp.float32)
        g, x, w = normal(rows, n), normal(rows, m), normal(m, n)
        scales = {zeros: _scale_for(g, zeros) for zeros in ZEROS}
        calls: dict[str, Timed] = {"dense": timed(jax.jit(_dense), g, x, w), "read": timed(jax.jit(_read), g)}
        made, products, whole = jax.jit(_made), jax.jit(_products, static_argnums=3), jax.jit(_whole, static_argnums=4)
        for zeros, scale in scales.items():
            calls[f"made {zeros}"] = timed(made, g, scale)
            calls[f"products {zeros}"] = timed(products, msbp.Entries(made(g, scale)[0]), x, w, backend)
            calls[f"whole {zeros}"] = timed(whole, g, scale, x, w, backend)
        ms = medians(calls, context.rounds)
        for zeros in ZEROS:
            yield {
                "rows x in x out": f"{rows}x{m}x{n}",
                "zeros, %": round(100 * zeros, 1),
                "dense_ms": round(ms["dense"], 2),
                "dense/dithered": round(ms["dense"] / ms[f"whole {zeros}"], 2),
                "dense/products": round(ms["dense"] / ms[f"products {zeros}"], 2),
                "dithering/reading": round(ms[f"made {zeros}"] / ms["read"], 2),
                "backend": backend,
            }


def _scale_for(g: jax.Array, zeros: float) -> jax.Array:
    """Return the scale at which so many entries become 0, by bisection."""
    share = jax.jit(lambda s: 1 - _made(g, s)[1].sum() / g.size)
    low, high = 0.1, 1000.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if float(share(jnp.float32(middle))) < zeros else (low, middle)
    return jnp.float32(low)


def _made(g: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return kernels.dither(g, jnp.asarray([1, 2], jnp.uint32), scale * kernels.spread(g))


def _whole(g: jax.Array, scale: jax.Array, x: jax.Array, w: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
    return _products(msbp.Entries(_made(g, scale)[0]), x, w, backend)


def _dense(g: jax.Array, x: jax.Array, w: jax.Array) -> Any:
    return jax.vjp(jnp.matmul, x, w)[1](g)


def _read(g: jax.Array) -> jax.Array:
    return jnp.abs(g).sum(axis=0)


def _products(p: msbp.Entries, x: jax.Array, w: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
    return kernels.grad_input(p, w, 1, backend=backend), kernels.grad_weight(p, x, 1, backend=backend)
