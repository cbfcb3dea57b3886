"""One layer's backward: selection, dx and dw, each backend beside dense XLA and PyTorch, over shapes and densities."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.helpers import gradients
from benchmarks.helpers.backends import compiled
from benchmarks.helpers.records import Row
from benchmarks.helpers.timing import Timed, medians, timed
from benchmarks.suite.context import Context, layers
from msbp_jax import kernels

TARGETS = ((0.01, 1), (0.04, 1), (0.04, 128), (0.04, None))  # density and rows per group
_SLOW = 40e9  # multiply-adds by rows gathered one by one, from which on one call of plain XLA says enough


def arrays(rows: int, m: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Return (x, w) of a layer."""
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(keys[0], (rows, m)), jax.random.normal(keys[1], (m, n)) / m**0.5


def dense_backward(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
    """Return (dx, dw) as plain JAX has them."""
    return jax.vjp(jnp.matmul, x, w)[1](g)


def sparse_backward(x: jax.Array, w: jax.Array, g: jax.Array, k: int, group: int | None, backend: str | None) -> Any:
    """Return (dx, dw) by select and the two products."""
    p = kernels.select(g, k, group, backend=backend)
    return kernels.grad_input(p, w, 1, backend=backend), kernels.grad_weight(p, x, 1, backend=backend)


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each shape, density and group size, the time of dense over that of each backend."""
    grid, torch = layers(context), context.torch
    native = "native" in compiled("grad_input")
    for rows, m, n in grid.shapes:
        x, w = arrays(rows, m, n)
        g = gradients.gaussian(rows, n)
        dense = jax.jit(dense_backward)
        for density in grid.densities:
            k = max(1, round(density * n))
            calls: dict[str, Timed] = {"dense": timed(dense, x, w, g)}
            for name, group in grid.groups.items():
                for backend in ("native", "xla") if native else ("xla",):
                    if backend != "xla" or group != 1 or rows * k * m * 50 <= _SLOW:
                        function = functools.partial(sparse_backward, k=k, group=group, backend=backend)
                        calls[f"{backend} r={name}"] = timed(jax.jit(function), x, w, g)
            if not torch.reason:
                shape = {"rows": rows, "m": m, "n": n, "density": density}
                for method in ("dense", "meProp unified", "meProp simple"):
                    calls[f"torch {method}"] = torch.layer(method, method=method, **shape)
            ms = medians(calls, context.rounds if rows < 4096 else max(3, context.rounds // 3))
            if "xla r=1" not in ms:
                slow = jax.jit(functools.partial(sparse_backward, k=k, group=1, backend="xla"))
                ms["xla r=1"] = medians({"": timed(slow, x, w, g)}, 1, warm_up=1)[""]
            torch.forget()
            for name in grid.groups:
                row: Row = {"rows x in x out": f"{rows}x{m}x{n}", "density": density, "r": name}
                row["dense_ms"] = round(ms["dense"], 3)
                if native:
                    row["native_ms"] = round(ms[f"native r={name}"], 3)
                    row["dense/native"] = round(ms["dense"] / ms[f"native r={name}"], 2)
                row["dense/xla"] = round(ms["dense"] / ms[f"xla r={name}"], 2)
                if not torch.reason:
                    peer = "meProp unified" if name == "all" else "meProp simple" if name == "1" else "dense"
                    row["peer"] = f"torch {peer}"
                    row["peer/dense"] = round(ms[f"torch {peer}"] / ms["dense"], 2)
                    row["peer/msbp"] = round(ms[f"torch {peer}"] / ms[f"{'native' if native else 'xla'} r={name}"], 2)
                yield row


def measure_targets(context: Context) -> Iterator[Row]:
    """Yield dense over sparse as it is chosen, with nothing else in the run.

    Large detours leave the allocator and the caches in a state that small calls then pay for.
    """
    shapes = layers(context).shapes if context.small else ((1024, 1024, 1024), (2048, 2048, 2048))
    for rows, m, n in shapes:
        x, w = arrays(rows, m, n)
        g = gradients.gaussian(rows, n)
        calls: dict[str, Timed] = {"dense": timed(jax.jit(dense_backward), x, w, g)}
        for density, group in TARGETS:
            name = f"{f'r={group}' if group else 'all'}, {100 * density:.0f} %"
            function = functools.partial(sparse_backward, k=max(1, round(density * n)), group=group, backend=None)
            calls[name] = timed(jax.jit(function), x, w, g)
        ms = medians(calls, context.rounds)
        row: Row = {"rows x in x out": f"{rows}x{m}x{n}", "dense_ms": round(ms["dense"], 2)}
        yield row | {f"dense/sparse {name}": round(ms["dense"] / ms[name], 2) for name in calls if name != "dense"}


def measure_gradients(context: Context) -> Iterator[Row]:
    """Yield dense over sparse at density 0.04 for each kind of gradient: which columns are kept is not the same."""
    grid = layers(context)
    for rows, m, n in grid.shapes:
        x, w = arrays(rows, m, n)
        k = max(1, round(0.04 * n))
        for kind in gradients.KINDS:
            g = gradients.make(kind, rows, n, context.data)
            calls: dict[str, Timed] = {"dense": timed(jax.jit(dense_backward), x, w, g)}
            for name, group in grid.groups.items():
                function = functools.partial(sparse_backward, k=k, group=group, backend=None)
                calls[name] = timed(jax.jit(function), x, w, g)
            ms = medians(calls, context.rounds if rows < 4096 else max(3, context.rounds // 2))
            row: Row = {"rows x in x out": f"{rows}x{m}x{n}", "gradient": kind}
            row["dense_ms"] = round(ms["dense"], 2)
            yield row | {f"dense/sparse r={name}": round(ms["dense"] / ms[name], 2) for name in grid.groups}
