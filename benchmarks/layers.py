"""One layer's backward: selection, dx and dw, each backend beside dense XLA and PyTorch, over shapes and densities."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gradients
from benchmarks.peers import Torch
from benchmarks.timing import Timed, medians, timed
from msbp_jax import kernels

SHAPES = ((128, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096))  # rows, in, out
DENSITIES = (0.01, 0.04, 0.1, 0.25)
GROUPS = {"1": 1, "32": 32, "128": 128, "all": None}
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


def measure_products(rounds: int, torch: Torch) -> list[dict[str, Any]]:
    """Return, for each shape, density and group size, the time of dense over that of each backend."""
    table = []
    native = "native" in kernels.backends()["grad_input"]
    for rows, m, n in SHAPES:
        x, w = arrays(rows, m, n)
        g = gradients.gaussian(rows, n)
        dense = jax.jit(dense_backward)
        for density in DENSITIES:
            k = max(1, round(density * n))
            calls: dict[str, Timed] = {"dense": timed(dense, x, w, g)}
            for name, group in GROUPS.items():
                for backend in ("native", "xla") if native else ("xla",):
                    slow = backend == "xla" and group == 1 and rows * k * m * 50 > _SLOW
                    if not slow:
                        function = functools.partial(sparse_backward, k=k, group=group, backend=backend)
                        calls[f"{backend} r={name}"] = timed(jax.jit(function), x, w, g)
            if not torch.reason:
                shape = {"rows": rows, "m": m, "n": n, "density": density}
                for method in ("dense", "meProp unified", "meProp simple"):
                    calls[f"torch {method}"] = torch.layer(method, method=method, **shape)
            ms = medians(calls, rounds if rows < 4096 else max(3, rounds // 3))
            slow = jax.jit(functools.partial(sparse_backward, k=k, group=1, backend="xla"))
            if "xla r=1" not in ms:
                ms["xla r=1"] = medians({"": timed(slow, x, w, g)}, 1, warm_up=1)[""]
            torch.forget()
            for name in GROUPS:
                row: dict[str, Any] = {"rows x in x out": f"{rows}x{m}x{n}", "density": density, "r": name}
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
                table.append(row)
                print(row, flush=True)
    return table


def measure_targets(rounds: int) -> list[dict[str, Any]]:
    """Return dense over sparse as it is chosen, with nothing else in the run.

    Large detours leave the allocator and the caches in a state that small calls then pay for.
    """
    table = []
    for rows, m, n in ((1024, 1024, 1024), (2048, 2048, 2048)):
        x, w = arrays(rows, m, n)
        g = gradients.gaussian(rows, n)
        settings = {"r=1, 1 %": (0.01, 1), "r=1, 4 %": (0.04, 1), "r=128, 4 %": (0.04, 128), "all, 4 %": (0.04, None)}
        calls: dict[str, Timed] = {"dense": timed(jax.jit(dense_backward), x, w, g)}
        for name, (density, group) in settings.items():
            function = functools.partial(sparse_backward, k=max(1, round(density * n)), group=group, backend=None)
            calls[name] = timed(jax.jit(function), x, w, g)
        ms = medians(calls, rounds)
        row: dict[str, Any] = {"rows x in x out": f"{rows}x{m}x{n}", "dense_ms": round(ms["dense"], 2)}
        table.append(row | {f"dense/sparse {name}": round(ms["dense"] / ms[name], 2) for name in settings})
        print(table[-1], flush=True)
    return table


def measure_select(rounds: int, folder: pathlib.Path | None) -> list[dict[str, Any]]:
    """Return the time of select over that of `sum(abs(g))` in XLA, for each kind of gradient."""
    table = []
    backends = kernels.backends()["select"]
    for rows, _, n in SHAPES:
        for kind in gradients.KINDS:
            g = gradients.make(kind, rows, n, folder)
            k = max(1, round(0.04 * n))
            memory = jnp.zeros(n)
            calls: dict[str, Timed] = {"sum": timed(jax.jit(lambda g: jnp.abs(g).sum()), g)}
            for name, group in GROUPS.items():
                for backend in backends:
                    if backend == "xla" and rows > 2048:
                        continue
                    plain = functools.partial(kernels.select, k=k, rows_per_group=group, backend=backend)
                    calls[f"{backend} {name}"] = timed(jax.jit(plain), g)
                    with_memory = functools.partial(
                        kernels.select_with_memory, k=k, rows_per_group=group, backend=backend
                    )
                    calls[f"{backend} {name} with memory"] = timed(jax.jit(with_memory), g, memory)
            ms = medians(calls, rounds)
            for name in GROUPS:
                row: dict[str, Any] = {"rows x n": f"{rows}x{n}", "gradient": kind, "r": name}
                row["sum_ms"] = round(ms["sum"], 3)
                for backend in backends:
                    for memory_too in ("", " with memory"):
                        if (call := f"{backend} {name}{memory_too}") in ms:
                            row[f"{backend}{memory_too}/sum"] = round(ms[call] / ms["sum"], 2)
                table.append(row)
                print(row, flush=True)
    return table


def measure_gradients(rounds: int, folder: pathlib.Path | None) -> list[dict[str, Any]]:
    """Return dense over sparse at density 0.04 for each kind of gradient: which columns are kept is not the same."""
    table = []
    for rows, m, n in SHAPES:
        x, w = arrays(rows, m, n)
        k = max(1, round(0.04 * n))
        for kind in gradients.KINDS:
            g = gradients.make(kind, rows, n, folder)
            calls: dict[str, Timed] = {"dense": timed(jax.jit(dense_backward), x, w, g)}
            for name, group in GROUPS.items():
                function = functools.partial(sparse_backward, k=k, group=group, backend=None)
                calls[name] = timed(jax.jit(function), x, w, g)
            ms = medians(calls, rounds if rows < 4096 else max(3, rounds // 2))
            row: dict[str, Any] = {"rows x in x out": f"{rows}x{m}x{n}", "gradient": kind}
            row["dense_ms"] = round(ms["dense"], 2)
            table.append(row | {f"dense/sparse r={name}": round(ms["dense"] / ms[name], 2) for name in GROUPS})
            print(table[-1], flush=True)
    return table


def measure_layout(rounds: int) -> list[dict[str, Any]]:
    """Return what it costs that Flax stores a weight `[in, out]`, where the features kept are not contiguous rows."""
    table = []
    for rows, m, n in SHAPES:
        x, w = arrays(rows, m, n)
        k = max(1, round(0.04 * n))
        for name, group in GROUPS.items():
            p = jax.jit(functools.partial(kernels.select, k=k, rows_per_group=group))(gradients.gaussian(rows, n))
            calls: dict[str, Timed] = {}
            for backend in kernels.backends()["grad_input"]:
                if backend == "dense" or (backend == "xla" and group == 1):
                    continue
                for axis, oriented in ((1, w), (0, w.T.copy())):
                    dx = jax.jit(functools.partial(kernels.grad_input, feature_axis=axis, backend=backend))
                    dw = jax.jit(functools.partial(kernels.grad_weight, feature_axis=axis, backend=backend))
                    calls[f"{backend} dx {axis}"] = timed(dx, p, oriented)
                    calls[f"{backend} dw {axis}"] = timed(dw, p, x)
            ms = medians(calls, rounds)
            row: dict[str, Any] = {"rows x in x out": f"{rows}x{m}x{n}", "r": name}
            for backend in ("native", "xla"):
                for product in ("dx", "dw"):
                    if f"{backend} {product} 1" in ms:
                        ratio = ms[f"{backend} {product} 1"] / ms[f"{backend} {product} 0"]
                        row[f"{backend} {product}: [in, out] / [out, in]"] = round(ratio, 2)
            table.append(row)
            print(row, flush=True)
    return table
