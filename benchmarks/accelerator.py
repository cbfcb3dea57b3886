"""All that is to be measured on a GPU or TPU, in one command, within ten minutes; writes accelerator.json and .md.

python -m benchmarks.accelerator             # rates, layers, errors, and the transformer
python -m benchmarks.accelerator layers      # some of it
python -m benchmarks.accelerator --small     # minute sizes, to see that it runs; on a CPU the kernels are interpreted

rates        what this chip copies and multiplies, from which the floors follow
layers       backward of one layer (selection with memory, dx, dw): dense XLA, XLA's sparse, the kernels, what is chosen
errors       of both products, relative to the largest entry, against float64
transformer  a step of 12 layers with AdamW, dense and at density 1/8, and accuracy after 1,000 steps
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import msbp_jax as msbp
from benchmarks import language_model, tables
from msbp_jax import kernels
from msbp_jax.testing import dense_products

type Rows = list[dict[str, Any]]


class Setting(NamedTuple):
    """What is measured."""

    shapes: tuple[tuple[int, int, int], ...] = ((8192, 8192, 8192), (16384, 4096, 16384))
    densities: tuple[float, ...] = (1 / 16, 1 / 4)
    groups: tuple[int | None, ...] = (128, None, 1)
    checked: tuple[int, int, int] = (2048, 1024, 2048)
    rounds: int = 7
    calls: int = 10
    copied: int = 2**29
    multiplied: int = 8192
    model: language_model.Size = language_model.Size()
    backwards: tuple[str, ...] = ("dense", "top-k 1/8", "MSBP 1/8", "MSBP 1/8, whole batch")


SMALL = Setting(
    shapes=((64, 32, 128),),
    densities=(1 / 16,),
    groups=(16, None),
    checked=(32, 16, 64),
    rounds=1,
    calls=1,
    copied=2**10,
    multiplied=64,
    model=language_model.Size(layers=1, width=64, heads=2, length=32, batch=2, steps=2),
    backwards=("dense", "MSBP 1/8"),
)


def milliseconds(calls: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, float]:
    """Return the median time of each call; every round has all of them, each several times in a row."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(setting.rounds + 1):  # the first compiles
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(setting.calls)])
            if number:
                times[name].append((time.perf_counter() - start) / setting.calls)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def measure_rates(setting: Setting) -> Rows:
    """Return bytes copied and operations multiplied in a second."""
    source = jnp.ones(setting.copied, jnp.bfloat16)
    a = jnp.ones((setting.multiplied, setting.multiplied), jnp.bfloat16)
    copy, multiply = jax.jit(lambda x: x + jnp.bfloat16(1)), jax.jit(jnp.matmul)
    found = milliseconds({"copy": lambda: copy(source), "multiply": lambda: multiply(a, a)}, setting)
    return [
        {
            "copied, TB/s": float(f"{2 * source.nbytes / found['copy'] / 1e9:.4g}"),
            "multiplied, TFLOP/s": float(f"{2 * setting.multiplied**3 / found['multiply'] / 1e9:.4g}"),
        }
    ]


def floor(rows: int, m: int, n: int, k: int, rates: Mapping[str, float]) -> float:
    """Return the least milliseconds of a backward: every array once, and the operations of what is kept."""
    copied, multiplied = rates["copied, TB/s"] * 1e9, rates["multiplied, TFLOP/s"] * 1e9
    product = 2 * rows * k * m / multiplied
    select = 2 * rows * n / copied
    dx, dw = (2 * (rows * k + m * n + rows * m) / copied for _ in range(2))
    return select + max(dx, product) + max(dw, product)


def backward(
    k: int, group: int | None, backend: str | None, g: jax.Array, x: jax.Array, w: jax.Array, memory: jax.Array
) -> Any:
    """Return dx, dw and what is left for the memory of a layer."""
    p, left, rows = kernels.select_with_memory(g, memory, k, group, backend=backend)
    how = {"dtype": x.dtype, "backend": backend}
    return kernels.grad_input(p, w, 1, **how), kernels.grad_weight(p, x, 1, **how), left, rows


def arrays(rows: int, m: int, n: int, dtype: Any) -> list[jax.Array]:
    """Return g, x and w of a layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, n), (rows, m), (m, n)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def measure_layers(setting: Setting, rates: Mapping[str, float]) -> Rows:
    """Return, for each layer, the time of dense over that of each path, and of each path over the floor."""
    own = "gpu" if jax.default_backend() == "cpu" else jax.default_backend()
    table = []
    dense = jax.jit(lambda g, x, w: jax.vjp(jnp.matmul, x, w)[1](g))
    for shape in setting.shapes:
        g, x, w = arrays(*shape, jnp.bfloat16)
        memory = jnp.zeros(shape[2])
        for density in setting.densities:
            k = round(density * shape[2])
            least = floor(*shape, k, rates)
            for group in setting.groups:
                named = (own,) if group == 1 else ("xla", own)  # XLA gathers each row's weights: minutes
                calls: dict[str, Callable[[], Any]] = {"dense": functools.partial(dense, g, x, w)}
                for name in (*named, "chosen"):
                    backend = None if name == "chosen" else name
                    function = jax.jit(functools.partial(backward, k, group, backend))
                    calls[name] = functools.partial(function, g, x, w, memory)
                found = milliseconds(calls, setting)
                row: dict[str, Any] = {"layer": "x".join(map(str, shape)), "density": density, "r": group or "all"}
                row |= {"dense, ms": round(found["dense"], 3), "floor, ms": round(least, 3)}
                row |= {f"dense/{name}": round(found["dense"] / found[name], 2) for name in (*named, "chosen")}
                row["chosen/floor"] = round(found["chosen"] / least, 2)
                table.append(row)
                print(row, flush=True)
    return table


def measure_errors(setting: Setting) -> Rows:
    """Return the largest error of both products of each backend, over the largest entry."""
    rows, m, n = setting.checked
    platform = jax.default_backend()
    own = ("gpu", "tpu") if platform == "cpu" else (platform,)
    table = []
    for dtype, precision in ((jnp.bfloat16, None), (jnp.float32, "highest")):
        g, x, w = arrays(rows, m, n, dtype)
        for backend in ("xla", *own):
            p = kernels.select(g, n // 16, min(rows, 128), backend=backend)
            true = dense_products(p, x, w, 1)
            dx, dw = jax.jit(
                lambda p, x, w, b=backend, how=precision: (
                    kernels.grad_input(p, w, 1, precision=how, backend=b),
                    kernels.grad_weight(p, x, 1, precision=how, backend=b),
                )
            )(p, x, w)
            error = [
                float(np.abs(got - want).max() / np.abs(want).max()) for got, want in zip((dx, dw), true, strict=True)
            ]
            names = {"dtype": jnp.dtype(dtype).name, "backend": backend}
            table.append(names | {"dx": f"{error[0]:.1e}", "dw": f"{error[1]:.1e}"})
    return table


def measure_transformer(setting: Setting) -> Rows:
    """Return the time of a step, dense and sparse, and the accuracy after training."""
    numbers, size = language_model.text(), setting.model
    group = 128 if size.length >= 128 else size.length
    specs = {
        "dense": msbp.dense(),
        "top-k 1/8": msbp.top_k(density=1 / 8, rows_per_group=group),
        "MSBP 1/8": msbp.memorized(msbp.top_k(density=1 / 8, rows_per_group=group), decay=0.8),
        "MSBP 1/8, whole batch": msbp.memorized(msbp.top_k(density=1 / 8, rows_per_group=None), decay=0.8),
    }
    trainers = {name: language_model.Trainer(specs[name], numbers, size) for name in setting.backwards}
    found = milliseconds({name: trainer.step for name, trainer in trainers.items()}, setting)
    taken = 1 + setting.rounds * (setting.calls + 1) + setting.calls
    table = []
    for name, trainer in trainers.items():
        for _ in range(taken, size.steps):
            loss = trainer.step()
            if name == "dense":
                jax.block_until_ready(loss)
        row: dict[str, Any] = {"backward": name, "step, ms": round(found[name], 2)}
        row |= {"dense/step": round(found["dense"] / found[name], 2), "steps": max(taken, size.steps)}
        table.append(row | {"accuracy, %": round(trainer.accuracy(numbers, size), 2)})
        print(table[-1], flush=True)
    print(trainers["MSBP 1/8"].report, flush=True)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="layers, errors, transformer; all by default")
    parser.add_argument("--small", action="store_true", help="minute sizes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("results"), help="folder")
    args = parser.parse_args(arguments)
    setting = SMALL if args.small else Setting()
    if jax.default_backend() == "cpu" and not args.small:
        parser.error("no GPU or TPU: JAX runs on the CPU here, where only --small is of use")
    begun = time.perf_counter()
    rates = measure_rates(setting)
    result: dict[str, Rows] = {"rates": rates}
    measures: dict[str, Callable[[], Rows]] = {
        "errors": lambda: measure_errors(setting),
        "layers": lambda: measure_layers(setting, rates[0]),
        "transformer": lambda: measure_transformer(setting),
    }
    for part in args.parts or measures:
        result[part] = measures[part]()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    when = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "seconds": round(time.perf_counter() - begun),
    }
    lines = ["# Accelerator", "", f"Written by `python -m benchmarks.accelerator`: {when}.", ""]
    for part, rows in result.items():
        lines += [f"## {part}", "", tables.markdown(rows), ""]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "accelerator.json").write_text(json.dumps(when | result, indent=1) + "\n")
    (args.out / "accelerator.md").write_text("\n".join(lines))
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
