"""Backward of a dense convolution on the images that are kept, over the shares of them; dense is the better of two.

Dense is XLA's own, or the same with dw in chunks of output channels, which is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed
from benchmarks.suite.context import Context
from benchmarks.suite.convolutions import LAYERS, SMALL, Layer, convolution, operands
from benchmarks.suite.sparse_convolutions import geometry, gradients_in_chunks
from msbp_jax.kernels import images
from msbp_jax.kernels.native import calls as native

SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625)


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each layer, the dense backward over that of the images that are kept; nothing without native code."""
    if not native.available():
        return
    for layer in SMALL if context.small else LAYERS:
        draw = np.random.default_rng(0)
        x, w, g = operands(layer, draw)
        calls: dict[str, Timed] = {
            "dense": timed(jax.jit(functools.partial(_dense, layer)), x, w, g),
            "in chunks": timed(jax.jit(functools.partial(gradients_in_chunks, layer)), x, w, g),
        }
        for share in SHARES:
            kept = draw.permutation(layer.batch) < max(1, round(share * layer.batch))
            call = jax.jit(functools.partial(_kept, layer))
            calls[f"{share:g}"] = timed(call, x, w, g, jnp.asarray(kept, jnp.float32))
        ms = medians(calls, context.rounds)
        best = min(ms["dense"], ms["in chunks"])
        row: Row = dict(layer._asdict()) | {name: round(ms[name], 2) for name in ("dense", "in chunks")}
        yield row | {f"better dense/kept {share:g}": round(best / ms[f"{share:g}"], 2) for share in SHARES}


def _dense(layer: Layer, x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
    return jax.vjp(lambda x, w: convolution(layer, w, x), x, w)[1](g)


def _kept(layer: Layer, x: jax.Array, w: jax.Array, g: jax.Array, kept: jax.Array) -> Any:
    dx = images.grad_input(g, kept, w, geometry(layer), x.shape[1:-1])
    return dx, images.grad_weight(g, kept, x, geometry(layer))
