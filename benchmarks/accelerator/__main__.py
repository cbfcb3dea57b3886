"""All that is to be measured on a GPU or TPU, in one command, within ten minutes; writes accelerator.json and .md.

python -m benchmarks.accelerator             # rates, errors, layers, and the transformer
python -m benchmarks.accelerator layers      # some of it; rates always, as the floors follow from them
python -m benchmarks.accelerator --small     # minute sizes, to see that it runs, on a CPU too

rates        what this chip copies and multiplies, from which the floors follow
errors       of both products, relative to the largest entry, against float64; on a CPU the kernels are interpreted
layers       backward of one layer (selection with memory, dx, dw): dense XLA, XLA's sparse, the kernels, what is chosen
pieces       selection, dx and dw of one of these layers, each by itself
unbiased     backward of one layer with sampled rows and with dithering, in 8 bits too, drawing included
transformer  a step of 12 layers with AdamW, dense, columns at 1/8, rows, dithered; and accuracy after 300

Rows are written as they come. A part that was measured on this machine today is not measured again, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable, Iterator

import jax

from benchmarks.accelerator import errors, layers, pieces, rates, transformer, unbiased
from benchmarks.accelerator.setting import SMALL, Setting
from benchmarks.helpers import machine, paths, tables
from benchmarks.helpers.records import Records, Row, finished, today

PARTS = ("errors", "layers", "pieces", "unbiased", "transformer")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write tables.

    Args:
      arguments: Of the command line; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, help="what to measure; everything by default")
    parser.add_argument("--small", action="store_true", help="minute sizes; not written into benchmarks/results")
    parser.add_argument("--out", type=pathlib.Path, help="folder; benchmarks/results by default")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--since", default=today(), metavar="DATE", help="what is from this day on is there; today")
    args = parser.parse_args(arguments)
    setting = SMALL if args.small else Setting()
    if jax.default_backend() == "cpu" and not args.small:
        parser.error("no GPU or TPU: JAX runs on the CPU here, where only --small is of use")
    out = args.out or (paths.SMALL if args.small else paths.RESULTS)
    records = Records(out / "accelerator", machine.describe_accelerator(), args.since, args.again)
    settings = {"small": args.small}
    found = records.run("rates", settings, functools.partial(rates.measure, setting))
    measures: dict[str, Callable[[], Iterator[Row]]] = {
        "errors": functools.partial(errors.measure, setting),
        "layers": functools.partial(layers.measure, setting, found[0]),
        "pieces": functools.partial(pieces.measure, setting),
        "unbiased": functools.partial(unbiased.measure, setting),
        "transformer": functools.partial(transformer.measure, setting),
    }
    for name in args.parts or PARTS:
        rows = records.run(name, settings, measures[name])
        parts = finished(records.folder)
        ordered = {part: parts[part] for part in ("rates", *PARTS) if part in parts}
        tables.write(out, "accelerator", ordered, "Accelerator", "python -m benchmarks.accelerator")
        print(f"\n## {name}\n\n{tables.markdown(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
