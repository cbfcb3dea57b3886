"""Products of the rows that are kept, and steps of batches of which many rows are 0 or none is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import MLP, Setting, Transformer, step_of
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed, training
from benchmarks.suite.context import Context
from msbp_jax import kernels

SHAPES = ((1024, 1024, 1024), (256, 512, 512), (2048, 512, 2048), (4096, 1024, 1024))
DENSITIES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each shape and density, dense dx and dw over those of the rows that are kept."""
    for rows, m, n in ((16, 24, 80),) if context.small else SHAPES:
        draw = np.random.default_rng(0)
        normal = lambda *shape, draw=draw: jnp.asarray(draw.normal(size=shape), jnp.float32)
        g, x, w = normal(rows, n), normal(rows, m), normal(m, n)
        calls: dict[str, Timed] = {"dense": timed(jax.jit(_dense), g, x, w)}
        for density in DENSITIES:
            weight = np.zeros(rows, np.float32)
            weight[draw.permutation(rows)[: max(1, round(density * rows))]] = 2.0
            p = msbp.Rows(g, jnp.asarray(weight))
            for backend in ("native", "xla"):
                if backend in kernels.backends()["grad_input"]:
                    calls[f"{backend} {density}"] = timed(jax.jit(_sparse, static_argnums=3), p, x, w, backend)
        ms = medians(calls, context.rounds)
        for density in DENSITIES:
            row: Row = {"rows x in x out": f"{rows}x{m}x{n}", "density": round(density, 4)}
            row["dense_ms"] = round(ms["dense"], 2)
            for backend in ("native", "xla"):
                name = f"{backend} {density}"
                row[f"dense/{backend}"] = round(ms["dense"] / ms[name], 2) if name in ms else "-"
            yield row


def measure_steps(context: Context) -> Iterator[Row]:
    """Yield, for batches half of which is padding and for batches of none, plain steps over those that skip zeros."""
    for setting, what, mask in _batches(context):
        tx = optax.sgd(0.01)
        calls: dict[str, Timed] = {}
        model = msbp.sparse_vjp(setting.module, msbp.skip_zero_rows())
        params = model.init(jax.random.key(1), setting.x)["params"]
        for name, apply in (("dense", setting.module.apply), ("skipping", model.apply)):

            def loss(params: Any, x: jax.Array, y: jax.Array, apply: Any = apply, mask: Any = mask) -> jax.Array:
                losses = optax.softmax_cross_entropy_with_integer_labels(apply({"params": params}, x), y)
                return (losses * mask).sum() / mask.sum()

            def gradients(params: Any, memory: Any, x: jax.Array, y: jax.Array, loss: Any = loss) -> Any:
                return *jax.value_and_grad(loss)(params, x, y), memory

            calls[f"{name} gradients"] = timed(jax.jit(lambda p, x, y, f=gradients: f(p, {}, x, y)), params, setting.x,
                                               setting.y)  # fmt: skip
            calls[f"{name} step"] = training(
                step_of(tx, gradients), (params, {}, tx.init(params)), setting.x, setting.y
            )
            calls["forward"] = timed(jax.jit(loss), params, setting.x, setting.y)
        ms = medians(calls, context.rounds)
        backward = {name: max(1e-9, ms[f"{name} gradients"] - ms["forward"]) for name in ("dense", "skipping")}
        yield {
            "network": setting.name,
            "batch": what,
            "dense step_ms": round(ms["dense step"], 2),
            "dense/skipping, step": round(ms["dense step"] / ms["skipping step"], 3),
            "dense/skipping, backward": round(backward["dense"] / backward["skipping"], 2),
        }


def _batches(context: Context) -> Iterator[tuple[Setting, str, jax.Array]]:
    keys = jax.random.split(jax.random.key(0), 4)
    width, rows = (64, 16) if context.small else (1024, 1024)
    x, y = jax.random.normal(keys[0], (rows, 784)), jax.random.randint(keys[1], (rows,), 0, 10)
    mlp = Setting(f"MLP 784-{width}-{width}-10, batch {rows}", MLP(width, 3), x, y, 1)
    sequences, length, width, layers = (4, 8, 64, 1) if context.small else (32, 64, 256, 2)
    tokens = jax.random.randint(keys[2], (sequences, length + 1), 0, 128)
    module = Transformer(width=width, layers=layers)
    name = f"transformer {layers} x {width}, {sequences} x {length} tokens"
    text = Setting(name, module, tokens[:, :-1], tokens[:, 1:], 1)
    for setting in (mlp, text):
        ones = jnp.ones(setting.y.shape)
        if not context.small or setting is mlp:
            yield dataclasses.replace(setting), "no row is 0", ones
        if not context.small or setting is text:
            yield setting, "half of the examples are padding", ones.at[len(ones) // 2 :].set(0)


def _dense(g: jax.Array, x: jax.Array, w: jax.Array) -> Any:
    return jax.vjp(jnp.matmul, x, w)[1](g)


def _sparse(p: msbp.Rows, x: jax.Array, w: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
    return kernels.grad_input(p, w, 1, backend=backend), kernels.grad_weight(p, x, 1, backend=backend)
