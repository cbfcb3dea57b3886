"""Measure and write benchmarks/results: a JSON file a part, then all of them as one JSON and one Markdown file; plots.

python -m benchmarks                       # everything; half an hour on two cores
python -m benchmarks steps layers          # some of it; what was measured before is kept
python -m benchmarks --torch-python PATH   # PyTorch from another interpreter
python -m benchmarks --small               # minute sizes, to see that it runs; written into build/benchmarks

Rows are written as they come. A part that was measured on this machine today, with the same settings, is not measured
again, so that an interrupted run goes on where it stopped; the part that it was in is measured from its beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
from typing import Any

import msbp_jax as msbp
from benchmarks.helpers import machine, paths, plots, tables
from benchmarks.helpers.peers import Torch
from benchmarks.helpers.records import Records, finished, today
from benchmarks.suite import choice, step_costs
from benchmarks.suite.context import Context, Part
from benchmarks.suite.parts import PARTS, place

FITS = {"choice": choice.fit, "step costs": step_costs.fit}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parts = "\n".join(f"{name:12}{part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=f"{__doc__}\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", choices=tuple(PARTS), metavar="part", help="what to measure; everything by default")
    add("--out", type=pathlib.Path, help="folder; benchmarks/results by default")
    add("--data", type=pathlib.Path, help="folder with MNIST, to record gradients from")
    add("--rounds", type=int, help="calls of each candidate that count")
    add("--torch-python", help="interpreter that has PyTorch; this one by default")
    add("--suffix", default="", help="added to the names of the parts in the results")
    add("--small", action="store_true", help="minute sizes")
    add("--again", action="store_true", help="measure what is there already, too")
    add("--since", default=today(), metavar="DATE", help="what is from this day on is there; today by default")
    add("--fit", action="store_true", help="print coefficients of the cost models, fitted to `choice` and `step costs`")
    return parser


def settings(part: Part, context: Context) -> dict[str, Any]:
    """Return what the rows of a part depend on beside the machine."""
    found: dict[str, Any] = {"rounds": context.rounds, "freed memory": "kept" if context.keeps else "given back"}
    if part.records:
        found["recorded on"] = "digits" if context.data is None else "MNIST"
    if context.small:
        found["small"] = True
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, and print tables.

    Args:
      arguments: Of the command line; those of the process by default.
    """
    args = parser().parse_args(arguments)
    keeps = msbp.keep_freed_memory()  # before anything runs, for all methods alike
    out = args.out or (paths.SMALL if args.small else paths.RESULTS)
    with contextlib.closing(Torch(args.torch_python)) as torch:
        print(torch.reason or f"PyTorch {torch.version}", flush=True)
        records = Records(out / "parts", machine.describe(torch.version or torch.reason), args.since, args.again)
        for name in args.parts or PARTS:
            part = PARTS[name]
            context = Context(args.rounds or (1 if args.small else part.rounds), torch, args.data, args.small, keeps)
            print(f"\n## {name}{args.suffix}", flush=True)
            rows = records.run(name + args.suffix, settings(part, context), functools.partial(part.measure, context))
            assemble(out)
            print("\n" + tables.markdown(rows), flush=True)
    if args.fit:
        measured = finished(records.folder)
        for name, of in FITS.items():
            if name in measured and (not args.parts or name in args.parts):
                print(f"\n{name}")
                for kind, coefficients in of(measured[name]["rows"]).items():
                    print(f'    "{kind}": {coefficients},')


def assemble(out: pathlib.Path) -> None:
    """Put all parts that are finished, of this run and of those before, into results.json, results.md and plots.

    Args:
      out: The folder of the results; the parts are in `parts`.
    """
    parts = finished(out / "parts")
    ordered = {name: parts[name] for name in sorted(parts, key=place)}
    tables.write(out, "results", ordered, "Results", "python -m benchmarks")
    plots.write(out, ordered)


if __name__ == "__main__":
    main()
