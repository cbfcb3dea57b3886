"""Check what is claimed of dithered backprop, and write tables; a JSON file a run, and those that are there stay.

python -m benchmarks.dithered --data FOLDER             # everything; about an hour on two cores
python -m benchmarks.dithered zeros --tasks mlp         # zeros and accuracy against the scale, floats and 8 bits
python -m benchmarks.dithered workers                   # several workers, with a scale that grows with their number
python -m benchmarks.dithered --small                   # a few steps, to see that it runs

Times of the backward: `python -m benchmarks entries`. Time to an accuracy: `python -m benchmarks.time_to_accuracy`.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

import msbp_jax as msbp
from benchmarks.dithered import networks, training, workers
from benchmarks.helpers import machine, paths
from benchmarks.helpers.records import file_of, label_of, once, today
from benchmarks.helpers.tables import markdown

type Run = dict[str, Any]

SCALES = (1, 2, 4, 8, 16)
IN_8_BITS = (1, 4)
WORKERS = (1, 2, 4, 8, 16)
START = 2.0  # the scale of one worker
BATCH = 512  # of all workers together


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(
        "python -m benchmarks.dithered",
        description=f"{__doc__}\n{networks.__doc__}\n{workers.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("parts", nargs="*", choices=("zeros", "workers"), metavar="part", help="both by default")
    p.add_argument("--tasks", nargs="*", choices=tuple(networks.TASKS), default=list(networks.TASKS))
    p.add_argument("--data", type=pathlib.Path, help="folder with MNIST and CIFAR-10")
    p.add_argument("--out", type=pathlib.Path, help="folder; benchmarks/results/dithered by default")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--scales", type=int, nargs="*", help=f"of `zeros`, in floats; {SCALES} by default")
    p.add_argument("--in-8-bits", type=int, nargs="*", help=f"the same in 8 bits; {IN_8_BITS} by default")
    p.add_argument("--small", action="store_true", help="a few steps; written into build/benchmarks")
    return p


def run(folder: pathlib.Path, settings: dict[str, Any], make: Callable[[], Run]) -> Run:
    """Return a run, from its file or run now.

    Args:
      folder: Where files are.
      settings: What tells runs apart.
      make: Runs it.
    """
    label = label_of(settings)

    def made() -> Run:
        found = settings | {"date": today(), "machine": machine.describe("not used")} | make()
        print(label, found["accuracy"][-1], flush=True)
        return found

    return once(folder, label, made)


def zeros(folder: pathlib.Path, names: Iterable[str], args: argparse.Namespace) -> str:
    """Train every task at every scale, in floats and in 8 bits; return the tables."""
    text = "## Zeros and accuracy\n"
    for name in names:
        task = networks.make(name, args.data, small=args.small)
        plans: dict[str, msbp.Sparsifier | None] = {"dense": None}
        in_floats = SCALES if args.scales is None else args.scales
        in_8_bits = IN_8_BITS if args.in_8_bits is None else args.in_8_bits
        plans |= {f"scale {scale}": msbp.dithered(scale) for scale in in_floats}
        plans |= {f"scale {scale}, 8 bits": msbp.dithered(scale, bits=8) for scale in in_8_bits}
        runs: dict[str, list[Run]] = {plan: [] for plan in plans}
        settings = lambda plan, seed, name=name: {"data": _data(args), "task": name, "plan": plan, "seed": seed}
        seeds = args.seeds  # and further ones that are there
        while all(file_of(folder, label_of(settings(plan, seeds))).is_file() for plan in plans):
            seeds += 1
        for seed in range(seeds):
            for plan, sparsifier in plans.items():
                make = lambda task=task, sparsifier=sparsifier, seed=seed: training.train(task, sparsifier, seed)
                runs[plan].append(run(folder, settings(plan, seed), make))
        text += f"\n### {name}, {seeds} seeds\n\n{markdown([_row_of_zeros(plan, runs) for plan in plans])}\n"
    return text


def _row_of_zeros(plan: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    last = lambda run: run["accuracy"][-1]
    own, dense = ([last(run) for run in runs[name]] for name in (plan, "dense"))
    row: dict[str, Any] = {"plan": plan, "accuracy, %": f"{np.mean(own):.2f} ± {_deviation(own):.2f}"}
    row["below dense"] = f"{np.mean(dense) - np.mean(own):.2f}"
    noise = 2 * _deviation(dense) * (2 / len(own)) ** 0.5  # of a difference of means, were the method's seeds as alike
    row["within noise"] = "yes" if np.mean(dense) - np.mean(own) <= noise else "no"
    told = [epoch for run in runs[plan] for epoch in run["told"]]
    layers = [name for name in told[0] if name.endswith("density")] if told else []
    first, end = (
        {name: 100 * (1 - np.mean([run["told"][at][name] for run in runs[plan]])) for name in layers} for at in (0, -1)
    )
    row["zeros, %"] = f"{np.mean(list(end.values())):.1f}" if layers else "-"
    row["first epoch to last, of each layer"] = ", ".join(f"{first[n]:.0f} to {end[n]:.0f}" for n in layers) or "-"
    clipped = [name for name in (told[0] if told else {}) if name.endswith("clipped")]
    row["clipped a step"] = f"{np.mean([sum(epoch[n] for n in clipped) for epoch in told]):.3g}" if clipped else "-"
    return row


def _data(args: argparse.Namespace) -> str:
    return ("digits" if args.data is None else "real") + (" small" if args.small else "")


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def several_workers(folder: pathlib.Path, args: argparse.Namespace) -> str:
    """Train with every number of workers; return the table."""
    task = networks.make("mlp", args.data, small=args.small)
    batch = 64 if args.small else BATCH
    rows = []
    for number in WORKERS:
        for growth, scale in (("dense", None), ("constant", START), ("sqrt(N)", START * number**0.5)):
            runs = []
            for seed in range(args.seeds):
                settings = {
                    "data": _data(args),
                    "batch": batch,
                    "workers": number,
                    "scale": "none" if scale is None else f"{scale:.3g}",
                    "seed": seed,
                }
                make = lambda n=number, s=scale, seed=seed: workers.train(task, s, n, batch, seed)
                runs.append(run(folder, settings, make))
            last = lambda key, runs=runs: [run[key][-1] for run in runs]
            mean = lambda key, last=last: float(np.mean(last(key)))
            rows.append(
                {
                    "workers": number,
                    "scale": "-" if scale is None else f"{scale:.3g} ({growth})",
                    "accuracy, %": f"{mean('accuracy'):.2f} ± {_deviation(last('accuracy')):.2f}",
                    "loss": round(mean("loss"), 4),
                    "zeros of p, %": round(100 * mean("zeros_of_p"), 1),
                    "zeros of dw, %": round(100 * mean("zeros_of_dw"), 1),
                    "bits an entry of dw": round(mean("bits_of_dw"), 2),
                }
            )
    return f"## Workers\n\nBatch {batch} divided among them.\n\n{markdown(rows)}\n"


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write `dithered.md`, a section of it at a time.

    Args:
      arguments: Of the command line; those of the process by default.
    """
    args = parser().parse_args(arguments)
    msbp.keep_freed_memory()  # before anything runs, for all methods alike
    out = args.out or (paths.SMALL if args.small else paths.RESULTS) / "dithered"
    out.mkdir(parents=True, exist_ok=True)
    sections = {
        "zeros": lambda: zeros(out / "zeros", args.tasks, args),
        "workers": lambda: several_workers(out / "workers", args),
    }
    chosen = args.parts or list(sections)
    if "workers" in chosen and jax.device_count() < max(WORKERS):
        raise SystemExit(
            f"`workers` wants {max(WORKERS)} devices, and there are {jax.device_count()}. On a CPU start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={max(WORKERS)}, and `zeros` by itself without."
        )
    for name in chosen:
        text = machine.head(f"python -m benchmarks.dithered {name}", today())
        text += f", {args.seeds} seeds and those that were there.\n\n"
        text += sections[name]()
        (out / f"{name}.md").write_text(text)
        print("\n" + text, flush=True)


if __name__ == "__main__":
    main()
