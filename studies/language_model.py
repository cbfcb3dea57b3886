"""How well a transformer predicts characters: dense, top-k and memorized top-k in all layers of its blocks.

The text is Python's standard library. The default sizes are for a CPU; `benchmarks.accelerator` has larger ones.

python -m studies language_model --density 0.25 --steps 500
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.data import text
from benchmarks.helpers.language_model import Size, Trainer, methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this study can be told."""
    small = Size(layers=2, width=128, heads=4, length=64, batch=32, steps=500)
    for name, value in dataclasses.asdict(small).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--density", type=float, default=1 / 8)
    parser.add_argument("--only", nargs="*", help="names of methods; all of them by default")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train every method; yield the table so far after each."""
    numbers, size = text.load(), Size(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Size)})
    table: dict[str, dict[str, float]] = {}
    for name, sparsifier in methods(args.density, size.length).items():
        if args.only and name not in args.only:
            continue
        trainer = Trainer(sparsifier, numbers, size)
        loss: Any = float("nan")
        for _ in range(size.steps):
            loss = jax.block_until_ready(trainer.step())
        table[name] = {"loss": round(float(loss), 4), "accuracy, %": round(trainer.accuracy(numbers, size), 2)}
        print(f"{name:20s} {table[name]}", flush=True)
        yield {"size": dataclasses.asdict(size), "density": args.density, "methods": table}
