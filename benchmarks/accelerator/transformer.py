"""A step of a transformer with AdamW, dense and at density 1/8, and how well each predicts after training."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from benchmarks.accelerator.setting import Setting, milliseconds
from benchmarks.data import text
from benchmarks.helpers import language_model
from benchmarks.helpers.records import Row


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the time of a step, dense and sparse, and the accuracy after training."""
    numbers, size = text.load(), setting.model
    specs = language_model.methods(1 / 8, size.length)
    trainers = {name: language_model.Trainer(specs[name], numbers, size) for name in setting.backwards}
    few = setting._replace(rounds=min(3, setting.rounds), calls=min(5, setting.calls))  # a step takes a while
    found = milliseconds({name: trainer.step for name, trainer in trainers.items()}, few)
    taken = (few.rounds + 1) * (few.calls + 1)
    for name, trainer in trainers.items():
        for _ in range(taken, size.steps):
            trainer.step()
        jax.block_until_ready(trainer.state)
        row: Row = {"backward": name, "step, ms": round(found[name], 2)}
        row |= {"dense/step": round(found["dense"] / found[name], 2), "steps": max(taken, size.steps)}
        yield row | {"accuracy, %": round(trainer.accuracy(numbers, size), 2)}
    print(trainers["MSBP"].report, flush=True)
