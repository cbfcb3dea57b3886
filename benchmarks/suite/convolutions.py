"""Backward of a convolution, dense over sparse, on a grid of layers: selection with memory, dx and dw.

Of groups smaller than the batch it measures both paths: products on patches of the input, and the whole convolution on
the sparse gradient. What `kernels/choice/patches.py` chooses is held to this grid by a test.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import msbp_jax as msbp
from benchmarks.helpers.backends import compiled
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed
from benchmarks.suite.context import Context
from msbp_jax import kernels


class Layer(NamedTuple):
    """A convolution of square images.

    Attributes:
      batch: Images.
      size: Height and width of the input.
      channels_in: Features of the input.
      channels_out: Features of the output.
      window: Height and width of the kernel.
      stride: Along both axes.
    """

    batch: int
    size: int
    channels_in: int
    channels_out: int
    window: int
    stride: int


# Stages of a ResNet-18, bottlenecks of a ResNet-50, networks for CIFAR, MNIST and Atari.
LAYERS = (
    Layer(8, 56, 64, 64, 3, 1),
    Layer(32, 28, 128, 128, 3, 1),
    Layer(32, 14, 256, 256, 3, 1),
    Layer(32, 7, 512, 512, 3, 1),
    Layer(16, 56, 64, 128, 3, 2),
    Layer(16, 28, 128, 256, 3, 2),
    Layer(8, 56, 64, 256, 1, 1),
    Layer(8, 56, 256, 64, 1, 1),
    Layer(8, 56, 64, 64, 1, 1),
    Layer(32, 14, 256, 1024, 1, 1),
    Layer(32, 14, 1024, 256, 1, 1),
    Layer(32, 32, 3, 32, 3, 1),
    Layer(32, 16, 64, 64, 3, 1),
    Layer(32, 14, 32, 64, 3, 1),
    Layer(32, 16, 64, 128, 3, 1),
    Layer(32, 20, 32, 64, 4, 2),
    Layer(32, 9, 64, 64, 3, 1),
)
SMALL = (Layer(2, 6, 16, 16, 3, 1),)
DENSITIES = (0.04, 0.1, 0.25)
GROUPS: dict[str, int | str | None] = {"1": 1, "32": 32, "image": "example"}


def convolution(layer: Layer, w: jax.Array, x: jax.Array) -> jax.Array:
    """Return the convolution of a layer."""
    stride = (layer.stride, layer.stride)
    return lax.conv_general_dilated(x, w, stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def operands(layer: Layer, draw: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return images, kernel and gradient of a layer, normal numbers."""
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    x = normal(layer.batch, layer.size, layer.size, layer.channels_in)
    w = normal(layer.window, layer.window, layer.channels_in, layer.channels_out)
    return x, w, normal(*jax.eval_shape(functools.partial(convolution, layer), w, x).shape)


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each layer and density, the time of the dense backward over that of each group size and path."""
    on_patches = "native" if "native" in compiled("grad_input") else "xla"
    for layer in SMALL if context.small else LAYERS:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (layer.batch, layer.size, layer.size, layer.channels_in))
        fan_in = layer.window**2 * layer.channels_in
        w = jax.random.normal(keys[1], (layer.window, layer.window, layer.channels_in, layer.channels_out))
        w = w / fan_in**0.5
        g = jax.random.normal(keys[2], convolution(layer, w, x).shape)
        for density in DENSITIES[:1] if context.small else DENSITIES:
            dense = jax.jit(lambda w, x, g, layer=layer: jax.vjp(lambda w, x: convolution(layer, w, x), w, x)[1](g))
            calls: dict[str, Timed] = {"dense": timed(dense, w, x, g)}
            calls["batch"] = timed(_backward(layer, density, None, None, w, x), w, x, g)
            for name, group in GROUPS.items():
                for path, backend in (("patches", on_patches), ("whole", "dense")):
                    calls[f"{name}, {path}"] = timed(_backward(layer, density, group, backend, w, x), w, x, g)
            ms = medians(calls, context.rounds, warm_up=1)
            row: Row = dict(layer._asdict()) | {"density": density, "dense_ms": round(ms["dense"], 2)}
            row |= {f"dense/{name}": round(ms["dense"] / ms[name], 2) for name in calls if name != "dense"}
            row["chosen"] = "patches" if chosen(layer) else "whole"
            yield row


def chosen(layer: Layer) -> bool:
    """Return whether patches are chosen for a layer where nothing is said."""
    return kernels.patches_pay(layer.channels_in, layer.channels_out, layer.window**2, layer.stride**2)


def _backward(layer: Layer, density: float, group: Any, backend: str | None, w: jax.Array, x: jax.Array) -> Any:
    s = msbp.memorized(msbp.top_k(density=density, rows_per_group=group), decay=0.8)
    f = msbp.sparse_vjp(lambda w, x: convolution(layer, w, x), s, min_features=1, backend=backend)
    memory = f.init_memory(w, x)

    def backward(w: jax.Array, x: jax.Array, g: jax.Array) -> Any:
        # A loss whose gradient at the output is g: value_and_grad returns the new memory, too.
        loss = lambda p, m: jnp.vdot(f(p["w"], p["x"], memory=m), g)
        return msbp.value_and_grad(loss)({"w": w, "x": x}, memory)[1:]

    return jax.jit(backward)
