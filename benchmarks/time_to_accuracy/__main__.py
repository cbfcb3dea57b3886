"""Train every method for three budgets of seconds, and say when each is as good as the best dense batch size.

python -m benchmarks.time_to_accuracy mnist --data FOLDER          # one task
python -m benchmarks.time_to_accuracy --data FOLDER                # all of them; many hours on two cores
python -m benchmarks.time_to_accuracy --small                      # minute sizes, to see that it runs

First every method is tuned: one run with each learning rate at the middle budget, with a seed of its own. Then it is
run with its best rate for every budget and seed, the methods in turn. A run is one JSON file, written when it is
finished; those that are there are not run again. The summary is made of all that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

import msbp_jax as msbp
from benchmarks.helpers import machine, paths
from benchmarks.helpers.records import once, today
from benchmarks.time_to_accuracy import methods, summary, tasks
from benchmarks.time_to_accuracy.train import Trainer

TUNING_SEED = 1000


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(
        "python -m benchmarks.time_to_accuracy",
        description=f"{__doc__}\n{tasks.__doc__}\n{methods.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("tasks", nargs="*", choices=tuple(tasks.TASKS), metavar="task", help="all of them by default")
    p.add_argument("--data", type=pathlib.Path, help="folder with MNIST, EWT and CIFAR-10")
    p.add_argument("--out", type=pathlib.Path, help="folder; benchmarks/results/time_to_accuracy by default")
    p.add_argument("--seeds", type=int, help="5 by default, 3 for CNNs")
    p.add_argument("--only", nargs="*", help="names of methods")
    p.add_argument("--small", action="store_true", help="minute sizes; written into build/benchmarks")
    return p


class Runs:
    """The runs of a task, of which those in the folder are not run again.

    Args:
      task: The task.
      folder: Where its files are.
    """

    def __init__(self, task: tasks.Task, folder: pathlib.Path) -> None:
        self.task = task
        self.folder = folder
        self._machine = machine.describe("not used")
        self._trainers: dict[tuple[str, float], Trainer] = {}

    def run(self, name: str, rate: float, seed: int, budget: float, density: float = 1.0) -> dict[str, Any]:
        """Return a run, from its file or run now.

        Args:
          name: Of the method.
          rate: Learning rate.
          seed: Of parameters and order.
          budget: Seconds.
          density: What uniform rows keep.
        """
        settled = f" {density:g}" if name == methods.UNIFORM else ""
        label = f"{name}{settled} rate {rate:g} seed {seed} budget {budget:g}"
        return once(self.folder, label, lambda: self._made(name, rate, seed, budget, density))

    def _made(self, name: str, rate: float, seed: int, budget: float, density: float) -> dict[str, Any]:
        trainer = self._trainers.get((name, density))
        if trainer is None:
            trainer = self._trainers[name, density] = Trainer(self.task, methods.make(self.task, name, density))
        points = [dataclasses.asdict(point) for point in trainer.run(rate, seed, budget)]
        points = [{key: round(value, 5) for key, value in point.items()} for point in points]
        found = {"task": self.task.name, "method": name, "rate": rate, "seed": seed, "budget": budget}
        found |= {"batch": trainer.batch, "date": today(), "machine": self._machine, "points": points}
        last = points[-1]
        print(
            f"{self.task.name}: {name}, rate {rate:g}, seed {seed}, {budget:g} s: {last['accuracy']:.2f} %, "
            f"loss {last['loss']:.4f}, density {last['density']:.2f}, {last['examples']} examples",
            flush=True,
        )
        return found


def measure(runs: Runs, names: list[str], seeds: int) -> list[dict[str, Any]]:
    """Tune and run all methods of a task; return the runs that count."""
    task = runs.task
    middle = task.budgets[len(task.budgets) // 2]
    best: dict[str, float] = {}
    density = 1.0
    for name in names:
        tuned = [runs.run(name, rate, TUNING_SEED, middle, density) for rate in task.rates]
        chosen = max(tuned, key=lambda run: run["points"][-1]["accuracy"])
        best[name] = chosen["rate"]
        if name == methods.REFERENCE:
            density = round(sum(point["density"] for point in chosen["points"]) / len(chosen["points"]), 3)
    return [
        runs.run(name, best[name], seed, budget, density)
        for seed in range(seeds)
        for budget in task.budgets
        for name in names
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write the summaries.

    Args:
      arguments: Of the command line; those of the process by default.
    """
    args = parser().parse_args(arguments)
    msbp.keep_freed_memory()  # before anything runs, for all methods alike
    out = args.out or (paths.SMALL if args.small else paths.RESULTS) / "time_to_accuracy"
    for name in args.tasks or tasks.TASKS:
        task = tasks.make(name, args.data, small=args.small)
        known = [method for method in methods.NAMES if method not in methods.OF_CONVOLUTIONS or not task.in_loops]
        chosen = [method for method in known if args.only is None or method in args.only]
        seeds = args.seeds or (1 if args.small else 3 if name.startswith("cnn") else 5)
        found = measure(Runs(task, out / name), chosen, seeds)
        print("\n" + summary.write(out, name, found), flush=True)


if __name__ == "__main__":
    main()
