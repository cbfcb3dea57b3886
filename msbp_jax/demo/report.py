"""What the demo prints and writes at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from msbp_jax.demo.data import Dataset
from msbp_jax.demo.run import Result
from msbp_jax.demo.settings import Settings


def show(settings: Settings, data: Dataset, results: Mapping[str, Result]) -> None:
    """Print the comparison and the library's report, and write the picture and the numbers that were asked for.

    Args:
      settings: What was trained.
      data: On what.
      results: What came of it.
    """
    console = Console()
    console.print(table(settings, data, results))
    dense, sparse = results["dense"], results["MSBP"]
    if sparse.step_ms > dense.step_ms:
        console.print("At this size a sparse step is slower than a dense one here: try wider layers or larger groups.")
    console.print(str(sparse.report), highlight=False, soft_wrap=True)
    if settings.plot is not None:
        from msbp_jax.demo.plot import draw  # Matplotlib is an optional dependency

        draw(settings.plot, data.name, results)
        console.print(f"Loss and accuracy over time: {settings.plot}")
    if settings.json is not None:
        settings.json.write_text(json.dumps(numbers(results), indent=1) + "\n")


def table(settings: Settings, data: Dataset, results: Mapping[str, Result]) -> Table:
    """Return one row a method."""
    layers = "-".join([str(data.train_x.shape[1]), *[str(settings.width)] * settings.depth, "10"])
    heading = f"{data.name}, {layers}, batch {settings.batch}, {settings.epochs} epochs of {settings.optimizer}"
    view = Table(title=heading, title_justify="left")
    for name in ("method", "test accuracy", "backward", "speed-up", "step", "speed-up", "multiply-adds kept"):
        view.add_column(name, justify="left" if name == "method" else "right")
    dense = results["dense"]
    for name, result in results.items():
        view.add_row(
            name,
            f"{result.accuracy[-1]:.2%}",
            f"{result.backward_ms:.2f} ms",
            f"{_ratio(dense.backward_ms, result.backward_ms):.2f}x",
            f"{result.step_ms:.2f} ms",
            f"{_ratio(dense.step_ms, result.step_ms):.2f}x",
            f"{result.kept:.1%}",
        )
    return view


def numbers(results: Mapping[str, Result]) -> dict[str, dict[str, object]]:
    """Return everything that was measured, by method."""
    fields = ("seconds", "loss", "accuracy", "step_ms", "backward_ms", "kept")
    return {name: {field: getattr(result, field) for field in fields} for name, result in results.items()}


def _ratio(dense: float, sparse: float) -> float:
    return dense / sparse if sparse > 0 else float("nan")
