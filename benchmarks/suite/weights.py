"""Layers and networks whose weights are sparse, against dense ones: forward, backward, and whole steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.helpers.networks import MLP, NERVA, step_of
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed, training
from benchmarks.suite.context import Context
from msbp_jax.kernels import weights as kernels

SHAPES = ((1024, 1024, 1024), (512, 2048, 2048), (902, 768, 3072), (100, 3072, 1024), (16, 1024, 1024))
DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01)
STEP_DENSITIES = (0.2, 0.1, 0.05, 0.01)


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each layer and density, dense forward and backward over those of the entries, and their rates.

    "masked" are dense products of the weight with its zeros, which is made of the entries each time. PyTorch's dense
    layer and SparseProp's are peers where they are installed.
    """
    torch = context.torch
    densities = DENSITIES[-1:] if context.small else DENSITIES
    backend = "native" if kernels.native_is_available() else "xla"
    for rows, m, n in ((16, 24, 80),) if context.small else SHAPES:
        draw = np.random.default_rng(0)
        normal = lambda *shape, draw=draw: jnp.asarray(draw.normal(size=shape), jnp.float32)
        x, w, g = normal(rows, m), normal(m, n), normal(rows, n)
        calls: dict[str, Timed] = {
            "dense y": timed(jax.jit(jnp.matmul), x, w),
            "dense": timed(jax.jit(_both), x, w, g),
        }
        times = jax.jit(functools.partial(kernels.times, backend=backend), static_argnums=3)
        gradient = jax.jit(functools.partial(kernels.gradient, backend=backend))
        for density in densities:
            entries = np.zeros(m * n, bool)
            entries[draw.permutation(m * n)[: round(density * m * n)]] = True
            sparse = msbp.prune({"params": w}, masks=entries.reshape(m, n))
            values, pattern = sparse["params"], sparse["sparsity"]["params"]
            calls[f"y {density}"] = timed(times, x, values, pattern, False)
            calls[f"dx {density}"] = timed(times, g, values, pattern, True)
            calls[f"dw {density}"] = timed(gradient, x, g, pattern)
            for name in dict.fromkeys((backend, "xla")):
                call = jax.jit(functools.partial(_sparse, name))
                calls[f"{name} {density}"] = timed(call, x, values, pattern, g)
        shape = {"rows": rows, "m": m, "n": n}
        if not torch.reason:
            calls["torch"] = torch.linear("torch", library="torch", density=1.0, **shape)
        if not torch.missing:
            for density in densities:
                name = f"sparseprop {density}"
                calls[name] = torch.linear(name, library="sparseprop", density=density, **shape)
        ms = medians(calls, context.rounds)
        torch.forget()
        for density in densities:
            work = 2e-6 * rows * round(density * m * n)  # millions of operations of a product
            row: Row = {"rows x in x out": f"{rows}x{m}x{n}", "zeros, %": round(100 * (1 - density), 1)}
            row |= {
                "dense_ms": round(ms["dense"], 2),
                "dense/sparse": round(ms["dense"] / ms[f"{backend} {density}"], 2),
            }
            row["dense/masked"] = round(ms["dense"] / ms[f"xla {density}"], 2)
            row["dense/sparse, y"] = round(ms["dense y"] / ms[f"y {density}"], 2)
            row |= {f"{p}, GFLOP/s": round(work / ms[f"{p} {density}"]) for p in ("y", "dx", "dw")}
            row["torch/dense"] = torch.reason or round(ms["torch"] / ms["dense"], 2)
            peer = ms.get(f"sparseprop {density}")
            row["sparseprop/sparse"] = (
                round(peer / ms[f"{backend} {density}"], 2) if peer else torch.missing["sparseprop"]
            )
            yield row | {"backend": backend}


NETWORKS = (("3072-1024-512-10", NERVA, 3072, 100), ("784-2048-2048-10", MLP(2048, 3), 784, 1024))


def measure_steps(context: Context) -> Iterator[Row]:
    """Yield, for each network and density, the time of a dense step over that of a sparse one, and their sizes."""
    densities = STEP_DENSITIES[:1] if context.small else STEP_DENSITIES
    for name, module, inputs, batch in (("small", MLP(32, 2), 16, 8),) if context.small else NETWORKS:
        keys = jax.random.split(jax.random.key(0), 3)
        x, y = jax.random.normal(keys[0], (batch, inputs)), jax.random.randint(keys[1], (batch,), 0, 10)
        variables = {"params": module.init(keys[2], x)["params"]}
        tx = optax.sgd(0.01, momentum=0.9)

        def start(params: Any, tx: Any = tx) -> Any:
            return params, {}, tx.init(params)

        dense = _step(tx, lambda params, x, module=module: module.apply({"params": params}, x))
        calls = {"dense": training(dense, start(variables["params"]), x, y)}
        shares: dict[float, tuple[float, float]] = {}
        for density in densities:
            sparse = msbp.prune(variables, density=density, method="random", scope="erdos_renyi", key=keys[0])
            model, patterns = msbp.sparse_weights(module), sparse["sparsity"]
            apply = lambda params, x, model=model, p=patterns: model.apply({"params": params, "sparsity": p}, x)
            calls[f"{density}"] = training(_step(tx, apply), start(sparse["params"]), x, y)
            held = [
                [jax.tree.leaves(tree) for tree in (start(v["params"]), v.get("sparsity"))] for v in (sparse, variables)
            ]
            moving, patterned = [
                [sum(leaf.nbytes for part in parts for leaf in part) for parts in both]
                for both in ([of[:1] for of in held], held)
            ]
            shares[density] = moving[0] / moving[1], patterned[0] / patterned[1]
        ms = medians(calls, context.rounds)
        for density in densities:
            yield {
                "network": name,
                "batch": batch,
                "density": density,
                "dense step_ms": round(ms["dense"], 2),
                "dense/sparse": round(ms["dense"] / ms[f"{density}"], 2),
                "parameters and state, %": round(100 * shares[density][0], 1),
                "with patterns, %": round(100 * shares[density][1], 1),
            }


def _step(tx: optax.GradientTransformation, apply: Any) -> Any:
    def gradients(params: Any, memory: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

        return *jax.value_and_grad(loss)(params), memory

    return step_of(tx, gradients)


def _sparse(backend: str, x: jax.Array, values: jax.Array, pattern: msbp.Pattern, g: jax.Array) -> Any:
    return (
        kernels.times(x, values, pattern, False, backend=backend),
        kernels.times(g, values, pattern, True, backend=backend),
        kernels.gradient(x, g, pattern, backend=backend),
    )


def _both(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
    y, pull_back = jax.vjp(jnp.matmul, x, w)
    return y, pull_back(g)
