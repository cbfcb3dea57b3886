"""Convolutions whose kernels are sparse, against dense ones: forward, dx and dw, and steps of a ResNet-18.

Dense is the better of two: XLA's own, and the same with dw in chunks of output channels, which is exact, and which a
CPU makes faster where images are large and channels many.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import msbp_jax as msbp
from benchmarks.helpers.networks import step_of
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed, training
from benchmarks.suite.context import Context
from benchmarks.suite.convolutions import Layer, convolution, operands
from msbp_jax.kernels import convolutions as kernels
from msbp_jax.kernels import weights

# Stages of a ResNet-18 at batch 32, of one for CIFAR, a kernel of one place, a first layer.
LAYERS = (
    Layer(32, 56, 64, 64, 3, 1),
    Layer(32, 28, 128, 128, 3, 1),
    Layer(32, 14, 256, 256, 3, 1),
    Layer(32, 7, 512, 512, 3, 1),
    Layer(32, 56, 64, 128, 3, 2),
    Layer(32, 56, 64, 128, 1, 2),
    Layer(32, 14, 256, 1024, 1, 1),
    Layer(128, 32, 32, 32, 3, 1),
    Layer(128, 8, 128, 128, 3, 1),
    Layer(128, 32, 3, 32, 3, 1),
)
SMALL = (Layer(2, 6, 16, 16, 3, 1),)
DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01)
STEP_DENSITIES = (0.2, 0.1, 0.05, 0.01)
CHUNKS = 4


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each layer and density, dense forward and backward over those of the entries.

    "masked" are dense convolutions with the kernel that is made of the entries each time.
    """
    densities = DENSITIES[:1] if context.small else DENSITIES
    backend = "native" if weights.native_is_available() else "xla"
    for layer in SMALL if context.small else LAYERS:
        draw = np.random.default_rng(0)
        x, w, g = operands(layer, draw)
        calls: dict[str, Timed] = {
            "dense": timed(jax.jit(functools.partial(_dense, layer)), x, w, g),
            "in chunks": timed(jax.jit(functools.partial(_in_chunks, layer)), x, w, g),
        }
        for density in densities:
            mask = draw.permutation(w.size).reshape(w.shape) < round(density * w.size)
            sparse = msbp.prune({"params": w}, masks=mask, input_axes={"params": 3})
            values, pattern = sparse["params"], sparse["sparsity"]["params"]
            for name in dict.fromkeys((backend, "xla")):
                call = jax.jit(functools.partial(_sparse, geometry(layer), name))
                calls[f"{name} {density}"] = timed(call, x, values, pattern, g)
        ms = medians(calls, context.rounds)
        best = min(ms["dense"], ms["in chunks"])
        for density in densities:
            yield dict(layer._asdict()) | {
                "zeros, %": round(100 * (1 - density), 1),
                "dense_ms": round(ms["dense"], 2),
                "in chunks_ms": round(ms["in chunks"], 2),
                "dense/sparse": round(ms["dense"] / ms[f"{backend} {density}"], 2),
                "better dense/sparse": round(best / ms[f"{backend} {density}"], 2),
                "better dense/masked": round(best / ms[f"xla {density}"], 2),
                "backend": backend,
            }


class ResNet18(nn.Module):
    """The network for images of 32 x 32: four stages of two blocks of two convolutions, batch norm.

    Attributes:
      width: Channels of the first stage.
      stages: How many there are; fewer to see that it runs.
    """

    width: int = 64
    stages: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Return logits `[batch, 10]`."""
        norm = lambda x: nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        conv = lambda n, strides: nn.Conv(n, (3, 3), (strides, strides), use_bias=False)
        x = nn.relu(norm(conv(self.width, 1)(x)))
        for stage in range(self.stages):
            for block in range(2):
                channels, strides = self.width * 2**stage, 2 if stage > 0 and block == 0 else 1
                y = nn.relu(norm(conv(channels, strides)(x)))
                y = norm(conv(channels, 1)(y))
                if x.shape != y.shape:
                    x = norm(nn.Conv(channels, (1, 1), (strides, strides), use_bias=False, name=f"shortcut{stage}")(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def measure_steps(context: Context) -> Iterator[Row]:
    """Yield the time of a dense training step of a ResNet-18 over that of a sparse one, and their sizes."""
    width, stages, batch, size = (8, 2, 4, 8) if context.small else (64, 4, 32, 32)
    module, keys = ResNet18(width, stages), jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (batch, size, size, 3)), jax.random.randint(keys[1], (batch,), 0, 10)
    variables = module.init(keys[2], x)
    tx = optax.sgd(0.1, momentum=0.9)
    include = [f"Conv_{i}/kernel" for i in range(1, 1 + 4 * stages)]  # the first layer and the shortcuts stay dense

    def start(variables: Any) -> Any:
        return variables["params"], variables["batch_stats"], tx.init(variables["params"])

    calls = {"dense": training(_step(tx, module, {}), start(variables), x, y)}
    shares: dict[float, float] = {}
    for density in STEP_DENSITIES[:1] if context.small else STEP_DENSITIES:
        sparse = msbp.prune(variables, density=density, include=include, input_axes={"Conv_*": 3})
        model = msbp.sparse_weights(module)
        calls[f"{density}"] = training(_step(tx, model, {"sparsity": sparse["sparsity"]}), start(sparse), x, y)
        held = [sum(leaf.nbytes for leaf in jax.tree.leaves(start(v)[::2])) for v in (sparse, variables)]
        shares[density] = held[0] / held[1]
    ms = medians(calls, context.rounds)
    for density, share in shares.items():
        yield {
            "network": f"ResNet-18, width {width}, {size} x {size}",
            "batch": batch,
            "density": density,
            "dense step_ms": round(ms["dense"], 1),
            "dense/sparse": round(ms["dense"] / ms[f"{density}"], 2),
            "parameters and state, %": round(100 * share, 1),
        }


def geometry(layer: Layer) -> kernels.Geometry:
    """Return a layer's geometry, of which padding is "SAME"."""
    two = lambda one: (one, one)
    window, strides = two(layer.window), two(layer.stride)
    padding = lax.padtype_to_pads(two(layer.size), window, strides, "SAME")
    return kernels.Geometry(window=window, strides=strides, padding=tuple(padding), dilation=two(1))


def _step(tx: optax.GradientTransformation, model: Any, patterns: Any) -> Any:
    def gradients(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": stats, **patterns}
            logits, changed = model.apply(variables, x, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, grads, stats

    return step_of(tx, gradients)


def _sparse(
    of: kernels.Geometry, backend: str, x: jax.Array, values: jax.Array, pattern: msbp.Pattern, g: jax.Array
) -> Sequence[jax.Array]:
    return (
        kernels.times(x, values, pattern, of, backend=backend),
        kernels.input_gradient(g, values, pattern, of, x.shape, backend=backend),
        kernels.weight_gradient(x, g, pattern, of, backend=backend),
    )


def _dense(layer: Layer, x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
    y, pull_back = jax.vjp(functools.partial(convolution, layer), w, x)
    return y, pull_back(g)


def gradients_in_chunks(layer: Layer, x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return dx and dw as XLA computes them, dw in chunks of output channels."""
    chunks = [
        jax.vjp(lambda w: convolution(layer, w, x), part)[1](of_part)[0]
        for part, of_part in zip(jnp.split(w, CHUNKS, axis=-1), jnp.split(g, CHUNKS, axis=-1), strict=True)
    ]
    return jax.vjp(lambda x: convolution(layer, w, x), x)[1](g)[0], jnp.concatenate(chunks, axis=-1)


def _in_chunks(layer: Layer, x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
    return convolution(layer, w, x), *gradients_in_chunks(layer, x, w, g)
