"""Measure and write benchmarks/results: one JSON, one Markdown file, plots.

python -m benchmarks                       # everything; half an hour on two cores
python -m benchmarks steps layers          # some of it; what was measured before is kept
python -m benchmarks --torch-python PATH   # PyTorch from another interpreter

layers      backward of one layer over shapes, densities and groups: each backend, dense XLA, PyTorch
targets     backward of one layer, only dense and what is chosen, at the settings the project set itself
select      the selection alone, over the time of reading the gradient once, on three kinds of gradients
gradients   backward of one layer at density 0.04 on three kinds of gradients
layout      the products with weights [in, out], as Flax has them, over the same with [out, in]
steps       whole training steps: networks, optimizers, the bound of Amdahl's law, PyTorch
memory      what a compiled step holds at its peak
choice      every path of the products on a grid, and what the automatic choice takes of it
compile     tracing and compiling a 12-layer step
conv        backward of convolutions of a ResNet-18
transformer a training step of a larger transformer at density 0.1
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
from collections.abc import Callable
from typing import Any

from benchmarks import choice, compile_time, convolutions, layers, steps, tables
from benchmarks.peers import Torch

ROUNDS = {
    "layers": 7,
    "targets": 21,
    "select": 11,
    "gradients": 5,
    "layout": 7,
    "steps": 7,
    "memory": 1,
    "choice": 7,
    "compile": 5,
    "conv": 7,
    "transformer": 5,
}


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*ROUNDS, []], help="what to measure; everything by default")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("results"), help="folder")
    parser.add_argument("--data", type=pathlib.Path, help="folder with MNIST, to record gradients from")
    parser.add_argument("--rounds", type=int, help="calls of each candidate that count")
    parser.add_argument("--torch-python", help="interpreter that has PyTorch; this one by default")
    parser.add_argument("--suffix", default="", help="added to the names of the parts in the results")
    parser.add_argument("--fit", action="store_true", help="print coefficients of the cost model, fitted to `choice`")
    args = parser.parse_args()
    torch = Torch(args.torch_python)
    print(torch.reason or f"PyTorch {torch.version}", flush=True)
    measures: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "layers": lambda rounds: layers.measure_products(rounds, torch),
        "targets": layers.measure_targets,
        "select": lambda rounds: layers.measure_select(rounds, args.data),
        "gradients": lambda rounds: layers.measure_gradients(rounds, args.data),
        "layout": layers.measure_layout,
        "steps": lambda rounds: steps.measure_steps(rounds, torch),
        "memory": lambda rounds: steps.measure_memory(),
        "choice": choice.measure,
        "compile": compile_time.measure,
        "conv": convolutions.measure,
        "transformer": steps.measure_transformer,
    }
    for part in args.parts or ROUNDS:
        print(f"\n## {part}", flush=True)
        rows = measures[part](args.rounds or ROUNDS[part])
        when = {"date": datetime.date.today().isoformat(), "machine": tables.machine(torch.version or torch.reason)}
        tables.write(args.out, {part + args.suffix: {**when, "rows": rows}})
        print("\n" + tables.markdown(rows), flush=True)
    torch.close()
    if args.fit:
        table = json.loads((args.out / "results.json").read_text())["choice"]["rows"]
        for kind, coefficients in choice.fit(table).items():
            print(f'    "{kind}": {coefficients},')


if __name__ == "__main__":
    main()
