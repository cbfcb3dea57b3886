"""Train networks from scratch, dense and with sparse weights; a JSON file a run, and those there stay.

python -m benchmarks.sparse_training --data FOLDER         # everything
python -m benchmarks.sparse_training mlp --methods dense rigl --seeds 1
python -m benchmarks.sparse_training --small               # minute sizes, to see that it runs
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import numpy as np

import msbp_jax as msbp
from benchmarks.helpers import machine, paths
from benchmarks.helpers.records import label_of, once, today
from benchmarks.helpers.tables import markdown
from benchmarks.sparse_training import methods, tasks

MARGIN = 0.5  # points below the dense run's accuracy, the time to which is told


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(
        "python -m benchmarks.sparse_training",
        description=f"{__doc__}\n{tasks.__doc__}\n{methods.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("tasks", nargs="*", choices=tuple(tasks.TASKS), metavar="task", help="all by default")
    p.add_argument("--methods", nargs="*", choices=methods.METHODS, default=list(methods.METHODS))
    p.add_argument("--data", type=pathlib.Path, help="folder with MNIST and CIFAR-10; digits without it")
    p.add_argument("--out", type=pathlib.Path, help="folder; benchmarks/results/sparse_training by default")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, help="in place of a task's own; runs and tables of their own")
    p.add_argument("--small", action="store_true", help="minute sizes; written into build/benchmarks")
    return p


def train(task: tasks.Task, args: argparse.Namespace, folder: pathlib.Path) -> dict[str, list[methods.Run]]:
    """Return the runs of each method, a seed after the other: made now, or read from their files."""
    kind = ("digits" if args.data is None else "real") + (" small" if args.small else "")

    def one(method: str, seed: int) -> methods.Run:
        density = 1.0 if method == "dense" else task.density
        settings = {"data": kind, "task": task.name, "method": method, "density": density, "seed": seed}
        settings |= {"epochs": task.epochs}

        def made() -> methods.Run:
            about = {"date": today(), "machine": machine.describe("not used")}
            found = settings | about | methods.run(method, task, seed)
            print({key: value for key, value in found.items() if key != "machine"}, flush=True)
            return found

        return once(folder, label_of(settings), made)

    runs: dict[str, list[methods.Run]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):
        for method in args.methods:
            runs[method].append(one(method, seed))
    return runs


def table(runs: dict[str, list[methods.Run]]) -> list[dict[str, Any]]:
    """Return a row for each method; what is told beside dense ones is left out where there are none."""
    mean = lambda found, key: float(np.mean([one[key] for one in found]))
    dense, rows = runs.get("dense"), []
    for method, found in runs.items():
        accuracies = [one["accuracy"] for one in found]
        row: dict[str, Any] = {
            "method": method,
            "density": found[0]["density in the end"],
            "accuracy, %": f"{np.mean(accuracies):.2f} ± {np.std(accuracies):.2f}",
            "seconds": round(mean(found, "seconds"), 1),
        }
        if dense is not None:
            whole = mean(dense, "state bytes")
            row |= {
                "x faster to the end": round(mean(dense, "seconds") / mean(found, "seconds"), 2),
                f"seconds to dense - {MARGIN:g}": _reached(found, dense),
                "state, of dense": f"{mean(found, 'state bytes') / whole:.1%}",
                "with patterns": f"{(mean(found, 'state bytes') + mean(found, 'pattern bytes')) / whole:.1%}",
            }
        row |= {"compiling, s": round(mean(found, "compiling"), 1), "programs": round(mean(found, "programs"), 1)}
        rows.append(row)
    return rows


def by_stage(runs: list[methods.Run]) -> list[dict[str, Any]]:
    """Return a row for each stage of gradual pruning, means over seeds."""
    found = [one["stages"] for one in runs]
    # The first step of a stage is the one that compiles, and is not among the seconds.
    ms = lambda stage: 1e3 * (stage["seconds"] - stage["of the change"]) / max(1, stage["steps"] - 1)
    return [
        {
            "density": same[0]["density"],
            "steps": same[0]["steps"],
            "seconds": round(float(np.mean([stage["seconds"] for stage in same])), 2),
            "of the change": round(float(np.mean([stage["of the change"] for stage in same])), 2),
            "ms a step": round(float(np.mean([ms(stage) for stage in same])), 2),
        }
        for same in zip(*found, strict=True)
    ]


def _reached(found: list[methods.Run], dense: list[methods.Run]) -> str:
    """Return the mean seconds after which runs are as good as the dense one of their seed, but for the margin."""
    seconds = []
    for one, beside in zip(found, dense, strict=True):
        after = zip(one["seconds after epochs"], one["accuracies"], strict=True)
        seconds.append(next((passed for passed, right in after if right >= beside["accuracy"] - MARGIN), None))
    there = [passed for passed in seconds if passed is not None]
    if len(there) == len(seconds):
        return f"{np.mean(there):.1f}"
    return f"reached by {len(there)} of {len(seconds)}" if there else "not reached"


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write a table for each task.

    Args:
      arguments: Of the command line; those of the process by default.
    """
    args = parser().parse_args(arguments)
    msbp.keep_freed_memory()  # before anything runs, for all methods alike
    out = args.out or (paths.SMALL if args.small else paths.RESULTS) / "sparse_training"
    out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks or tasks.TASKS:
        task = tasks.make(name, args.data, small=args.small, epochs=args.epochs)
        runs = train(task, args, out / "runs")
        head = machine.head(f"python -m benchmarks.sparse_training {name}", today())
        text = f"{head}, {task.images.name}, seeds: {args.seeds}, epochs: {task.epochs}.\n\n{markdown(table(runs))}\n"
        for method in methods.GRADUAL:
            if method in runs:
                text += f"\nStage by stage, {method}:\n\n{markdown(by_stage(runs[method]))}\n"
        of_epochs = "" if args.epochs is None else f"_{args.epochs}_epochs"
        (out / f"{name}{of_epochs}.md").write_text(f"# {name}\n\n{text}")
        print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
