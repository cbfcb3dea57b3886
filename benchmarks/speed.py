"""Speed on this machine, each figure a ratio of medians from one interleaved run.

python benchmarks/speed.py                 # everything, a few minutes
python benchmarks/speed.py step backward   # some of it
python benchmarks/speed.py --out benchmarks/results/speed.json

step        whole training step of an MLP, dense over sparse, SGD and Adam, and what the memory adds
backward    backward of the hidden layers alone, dense over sparse
crossover   backward of one layer over widths and batches: where sparse starts to pay
compile     tracing and compiling the step of a 12-layer MLP, sparse over dense
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax.demo.timing import medians, training


class MLP(nn.Module):
    """Hidden layers of one width, relu, ten classes."""

    width: int
    depth: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def problem(width: int, depth: int, batch: int, sparsifier: msbp.Sparsifier | None) -> tuple[Any, ...]:
    """Return (loss and gradients, params, memory, x, y) of an MLP; without a sparsifier those of plain JAX."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (batch, 784)), jax.random.randint(keys[1], (batch,), 0, 10)
    module = MLP(width, depth)
    params = module.init(keys[2], x[:1])["params"]

    def loss_of(logits: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    if sparsifier is None:

        def plain(params: Any, memory: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
            loss, grads = jax.value_and_grad(lambda p: loss_of(module.apply({"params": p}, x), y))(params)
            return loss, grads, memory

        return plain, params, {}, x, y
    model = msbp.sparse_vjp(module, sparsifier)
    gradients = msbp.value_and_grad(lambda p, m, x, y: loss_of(model.apply({"params": p}, x, memory=m), y))
    return gradients, params, model.init_memory({"params": params}, x), x, y


def step_of(tx: optax.GradientTransformation, gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Return a whole training step over (params, memory, optimizer state)."""

    def step(state: tuple[Any, Any, Any], x: jax.Array, y: jax.Array) -> tuple[tuple[Any, Any, Any], jax.Array]:
        params, memory, opt_state = state
        loss, grads, memory = gradients(params, memory, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), memory, opt_state), loss

    return step


def measure_step(rounds: int) -> list[dict[str, Any]]:
    """Return, for each setting, the ratios of the whole step."""
    rows = []
    for width, batch, group in ((2048, 1024, 128), (500, 128, 128), (500, 128, 32)):
        top_k = msbp.top_k(density=0.04, rows_per_group=group)
        methods = {"dense": None, "top-k": top_k, "MSBP": msbp.memorized(top_k, decay=0.8)}
        for name, tx in (("SGD", optax.sgd(0.01)), ("Adam", optax.adam(1e-3))):
            calls = {}
            for method, sparsifier in methods.items():
                gradients, params, memory, x, y = problem(width, 2, batch, sparsifier)
                calls[method] = training(step_of(tx, gradients), (params, memory, tx.init(params)), x, y)
            ms = {method: 1e3 * seconds for method, seconds in medians(calls, rounds).items()}
            rows.append(
                {
                    "model": f"784-{width}-{width}-10",
                    "batch": batch,
                    "rows_per_group": group,
                    "optimizer": name,
                    **{f"{method}_ms": round(t, 2) for method, t in ms.items()},
                    "dense/MSBP": round(ms["dense"] / ms["MSBP"], 2),
                    "dense/top-k": round(ms["dense"] / ms["top-k"], 2),
                    "MSBP/top-k": round(ms["MSBP"] / ms["top-k"], 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def layer(rows: int, m: int, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (x, w, g) of one layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (rows, m)),
        jax.random.normal(keys[1], (m, n)) / m**0.5,
        jax.random.normal(keys[2], (rows, n)),
    )


def dense_backward(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (dx, dw) as plain JAX has them."""
    return jax.vjp(jnp.matmul, x, w)[1](g)


def sparse_backward(density: float, group: int | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return a function for (dx, dw) by select and the two products."""

    def backward(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        k = max(1, round(density * g.shape[1]))
        p = kernels.select(g, k, group)
        return kernels.grad_input(p, w, 1), kernels.grad_weight(p, x, 1)

    return backward


def hidden_backward(backward: Callable[..., Any], first: Any, second: Any) -> Any:
    """Return what training needs of two layers: dw of the first, dx and dw of the second."""
    return backward(*first)[1], backward(*second)


def measure_backward(rounds: int) -> list[dict[str, Any]]:
    """Return the ratios of the hidden layers' backward in 784-n-n-10: dw of the first, dx and dw of the second."""
    rows = []
    for width, batch, group in ((2048, 1024, 128), (2048, 1024, None), (500, 128, 128)):
        first, second = layer(batch, 784, width), layer(batch, width, width)
        methods = {"dense": dense_backward, "sparse": sparse_backward(0.04, group)}
        candidates = {name: jax.jit(functools.partial(hidden_backward, f)) for name, f in methods.items()}
        calls = {name: functools.partial(f, first, second) for name, f in candidates.items()}
        ms = {name: 1e3 * seconds for name, seconds in medians(calls, rounds).items()}
        row = {"model": f"784-{width}-{width}-10", "batch": batch, "rows_per_group": group}
        row |= {f"{name}_ms": round(t, 2) for name, t in ms.items()}
        rows.append(row | {"dense/sparse": round(ms["dense"] / ms["sparse"], 2)})
        print(rows[-1], flush=True)
    return rows


def measure_crossover(rounds: int) -> list[dict[str, Any]]:
    """Return the ratios of one square layer's backward (dx, dw and select) over widths, batches and groups."""
    rows = []
    for width in (64, 128, 256, 512, 1024, 2048):
        for batch in (32, 128, 1024):
            x, w, g = layer(batch, width, width)
            groups = {"r=1": 1, "r=32": 32, "r=128": 128, "whole": None}
            candidates = {"dense": dense_backward}
            candidates |= {name: sparse_backward(0.04, group) for name, group in groups.items()}
            calls = {name: functools.partial(jax.jit(f), x, w, g) for name, f in candidates.items()}
            ms = {name: 1e3 * seconds for name, seconds in medians(calls, rounds).items()}
            row = {"rows": batch, "in": width, "out": width, "dense_ms": round(ms["dense"], 3)}
            rows.append(row | {name: round(ms["dense"] / ms[name], 2) for name in groups})
            print(rows[-1], flush=True)
    return rows


def measure_compile(rounds: int) -> list[dict[str, Any]]:
    """Return tracing and compiling times of a 12-layer MLP's step."""
    rows: dict[str, list[tuple[float, float]]] = {"dense": [], "MSBP": []}
    methods = {"dense": None, "MSBP": msbp.memorized(msbp.top_k(density=0.04, rows_per_group=128), decay=0.8)}
    tx = optax.adam(1e-3)
    for _ in range(rounds):
        for name, sparsifier in methods.items():
            gradients, params, memory, x, y = problem(512, 12, 256, sparsifier)
            state = (params, memory, tx.init(params))
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(step_of(tx, gradients)).lower(state, x, y)
            middle = time.perf_counter()
            lowered.compile()
            rows[name].append((middle - start, time.perf_counter() - middle))
    total = {name: sorted(sum(times) for times in all_times)[rounds // 2] for name, all_times in rows.items()}
    trace = {name: sorted(times[0] for times in all_times)[rounds // 2] for name, all_times in rows.items()}
    row = {"model": "784-(512 x 12)-10", **{f"{name}_s": round(t, 2) for name, t in total.items()}}
    row |= {"MSBP/dense": round(total["MSBP"] / total["dense"], 2)}
    row |= {"tracing MSBP/dense": round(trace["MSBP"] / trace["dense"], 2)}
    print(row, flush=True)
    return [row]


PARTS = {
    "step": (measure_step, 25),
    "backward": (measure_backward, 25),
    "crossover": (measure_crossover, 15),
    "compile": (measure_compile, 5),
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row[h]) for h in head) + " |" for row in rows])


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; everything by default")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, help="calls of each candidate that count")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "devices": str(jax.devices())},
        "versions": {"jax": jax.__version__, "msbp_jax": msbp.__version__, "python": platform.python_version()},
    }
    for part in args.parts or PARTS:
        function, rounds = PARTS[part]
        print(f"\n## {part}", flush=True)
        result[part] = function(args.rounds or rounds)
        print("\n" + markdown(result[part]), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
