"""Train by small subnetworks, beside dense, narrower and pruned networks; a JSON file a run, and those there stay.

python -m benchmarks.subnetwork --data FOLDER              # everything
python -m benchmarks.subnetwork steps --tasks mlp          # time and memory of a step
python -m benchmarks.subnetwork variance                   # of the structure's gradient
python -m benchmarks.subnetwork train --shares 0.1 --seeds 1
python -m benchmarks.subnetwork --small                    # minute sizes, to see that it runs
"""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import msbp_jax as msbp
from benchmarks.helpers import machine, paths
from benchmarks.helpers.records import label_of, once, today
from benchmarks.helpers.tables import markdown
from benchmarks.helpers.timing import Timed, medians, training
from benchmarks.subnetwork import methods, tasks, variance

SHARES = (0.5, 0.2, 0.1, 0.05)
PARTS = ("steps", "variance", "train")
METHODS = ("dense", *methods.METHODS)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(
        "python -m benchmarks.subnetwork",
        description=f"{__doc__}\n{tasks.__doc__}\n{variance.__doc__}\n{methods.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("parts", nargs="*", choices=PARTS, metavar="part", help="all by default")
    p.add_argument("--tasks", nargs="*", choices=tuple(tasks.TASKS), default=list(tasks.TASKS))
    p.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="of `train`")
    p.add_argument("--shares", nargs="*", type=float, default=list(SHARES), help="of the units that are kept")
    p.add_argument("--data", type=pathlib.Path, help="folder with MNIST and CIFAR-10; digits without it")
    p.add_argument("--out", type=pathlib.Path, help="folder; benchmarks/results/subnetwork by default")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, help="of `train`, in place of the task's own; runs and tables of their own")
    p.add_argument("--rounds", type=int, default=9, help="calls of each step that count")
    p.add_argument("--small", action="store_true", help="minute sizes; written into build/benchmarks")
    return p


def steps(task: tasks.Task, shares: list[float], rounds: int) -> list[dict[str, Any]]:
    """Return the time of a step of each method over dense, and the memory that its program takes."""
    variables = task.init(task.widths, 0)
    units = task.units(variables)
    rows = task.order(0, 0)[0]
    x, y = jnp.asarray(task.images.train_x[rows]), jnp.asarray(task.images.train_y[rows])
    tx = task.optimizer(task.epochs)
    calls: dict[str, Timed] = {}
    memory: dict[str, float] = {}
    peak: dict[str, float] = {}  # with arguments and results, of which those that are donated count once

    def add(name: str, step: Any, state: Any, *batch: Any) -> None:
        calls[name] = training(step, state, *batch)
        analysis: Any = jax.jit(step, donate_argnums=0).lower(state, *batch).compile().memory_analysis()
        memory[name] = analysis.temp_size_in_bytes / 2**20
        own = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        peak[name] = memory[name] + own / 2**20

    def start(variables: Any) -> Any:
        params, stats = methods.split(variables)
        return params, stats, tx.init(params)

    add("dense", methods.plain_step(task.build(task.widths), tx), start(variables), x, y)
    for share in shares:
        sub = msbp.subnetwork(task.build, units=units, widths=dict(task.widths), budget=share)
        structure = sub.init(variables)
        sample = sub.sample(structure, jax.random.key(0))
        for kept_only in (True, False):
            name = f"{share:g}, {'kept' if kept_only else 'whole'} update"
            step = methods.narrow_step(sub, tx, kept_only=kept_only)
            add(name, step, (*start(variables), structure), sample, x, y)
        calls[f"{share:g}, drawing"] = _drawing(sub, structure)
        widths = methods.narrower(task, share)
        add(f"{share:g}, narrow", methods.plain_step(task.build(widths), tx), start(task.init(widths, 0)), x, y)
    ms = medians(calls, rounds)
    found = []
    for share in shares:
        kept, whole, drawing, narrow = (
            ms[f"{share:g}, {n}"] for n in ("kept update", "whole update", "drawing", "narrow")
        )
        found.append(
            {
                "units kept": share,
                "dense step_ms": round(ms["dense"], 1),
                "step_ms": round(kept + drawing, 2),
                "drawing_ms": round(drawing, 2),
                "dense/step": round(ms["dense"] / (kept + drawing), 2),
                "dense/step, whole update": round(ms["dense"] / (whole + drawing), 2),
                "dense/narrow": round(ms["dense"] / narrow, 2),
                "temporaries, MiB": round(memory[f"{share:g}, kept update"], 1),
                "of dense": round(memory["dense"], 1),
                "peak, MiB": round(peak[f"{share:g}, kept update"], 1),
                "peak of dense": round(peak["dense"], 1),
            }
        )
    return found


def _drawing(sub: msbp.Subnetwork, structure: msbp.Structure) -> Timed:
    at = iter(range(1_000_000))

    def call() -> float:
        key = jax.random.fold_in(jax.random.key(1), next(at))
        begun = time.perf_counter()
        jax.block_until_ready(sub.sample(structure, key))
        return time.perf_counter() - begun

    return call


def train(task: tasks.Task, args: argparse.Namespace, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Run every method at every share and seed; return the table."""
    kind = ("digits" if args.data is None else "real") + (" small" if args.small else "")

    def run(method: str, share: float, seed: int) -> dict[str, Any]:
        settings = {"data": kind, "task": task.name, "method": method, "share": share, "seed": seed}
        settings |= {} if args.epochs is None else {"epochs": args.epochs}

        def made() -> dict[str, Any]:
            function = methods.dense if method == "dense" else methods.METHODS[method]
            found = settings | {"date": today(), "machine": machine.describe("not used")} | function(task, share, seed)
            print({key: value for key, value in found.items() if key != "machine"}, flush=True)
            return found

        return once(folder, label_of(settings), made)

    plans = [("dense", 1.0)] if "dense" in args.methods else []
    plans += [(method, share) for share in args.shares for method in args.methods if method != "dense"]
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {plan: [] for plan in plans}
    for seed in range(args.seeds):
        for plan in plans:
            runs[plan].append(run(*plan, seed))
    mean = lambda plan, key: float(np.mean([one.get(key, 0.0) for one in runs[plan]]))
    return [
        {
            "method": plan[0],
            "units kept": plan[1],
            "accuracy, %": f"{mean(plan, 'accuracy'):.2f} ± {np.std([r['accuracy'] for r in runs[plan]]):.2f}",
            "seconds": round(mean(plan, "seconds"), 1),
            **(
                {"dense/seconds": round(mean(plans[0], "seconds") / mean(plan, "seconds"), 2)}
                if "dense" in args.methods
                else {}
            ),
            "units in the end": round(mean(plan, "units")),
            "compiling and choosing, s": round(mean(plan, "compiling") + mean(plan, "selecting"), 1),
            "programs": round(mean(plan, "programs"), 1),
        }
        for plan in plans
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write a table for each part and task.

    Args:
      arguments: Of the command line; those of the process by default.
    """
    args = parser().parse_args(arguments)
    msbp.keep_freed_memory()  # before anything runs, for all methods alike
    out = args.out or (paths.SMALL if args.small else paths.RESULTS) / "subnetwork"
    out.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        for name in args.tasks:
            task = tasks.make(name, args.data, small=args.small, epochs=args.epochs)
            table = {
                "steps": lambda task: steps(task, args.shares, args.rounds),
                "variance": lambda task: variance.measure(task, args.shares[-1]),
                "train": lambda task: train(task, args, out / "train"),
            }[part](task)
            seeds = f", {args.seeds} seeds, {task.epochs} epochs" if part == "train" else ""
            of_epochs = "" if args.epochs is None or part != "train" else f"_{args.epochs}_epochs"
            text = f"{machine.head(f'python -m benchmarks.subnetwork {part}', today())}{seeds}.\n\n"
            (out / f"{part}_{name}{of_epochs}.md").write_text(f"# {part}: {name}\n\n{text}{markdown(table)}\n")
            print(f"\n{text}{markdown(table)}", flush=True)


if __name__ == "__main__":
    main()
