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
    console.print(
        f"{described(settings)}. Test: accuracy. As dense: seconds until a method has the loss, or the test accuracy, "
        "that dense training ends with, without compilation. Backward and step: milliseconds of the trained network, "
        "and how many times faster than dense. Kept: share of the backward's multiply-adds, over the whole training."
    )
    slower = [name for name, result in results.items() if result.step_ms > results["dense"].step_ms]
    if slower:
        console.print(f"Slower than a dense step at this size, here: {', '.join(slower)}.")
    console.print(str(results["MSBP"].report), highlight=False, soft_wrap=True)
    if settings.plot is not None:
        from msbp_jax.demo.plot import draw  # Matplotlib is an optional dependency

        draw(settings.plot, f"{heading(settings, data)}\n{described(settings)}", results)
        console.print(f"Loss and accuracy over time: {settings.plot}")
    if settings.json is not None:
        settings.json.write_text(json.dumps(numbers(results), indent=1) + "\n")


def table(settings: Settings, data: Dataset, results: Mapping[str, Result]) -> Table:
    """Return one row a method."""
    view = Table(title=heading(settings, data), title_justify="left")
    for name in ("method", "test", "loss as dense", "test as dense", "backward", "step", "kept"):
        view.add_column(name, justify="left" if name == "method" else "right")
    dense = results["dense"]
    for name, result in results.items():
        view.add_row(
            name,
            f"{result.accuracy[-1]:.2%}",
            _seconds(result.time_to_loss(dense.loss[-1])),
            _seconds(result.time_to_accuracy(dense.accuracy[-1])),
            f"{result.backward_ms:.2f} {_ratio(dense.backward_ms, result.backward_ms):.2f}x",
            f"{result.step_ms:.2f} {_ratio(dense.step_ms, result.step_ms):.2f}x",
            f"{result.kept:.0%}",
        )
    return view


def heading(settings: Settings, data: Dataset) -> str:
    """Return what was trained, and on what."""
    layers = "-".join([str(data.train_x.shape[1]), *[str(settings.width)] * settings.depth, "10"])
    return f"{data.name}, {layers}, batch {settings.batch}, {settings.epochs} epochs of {settings.optimizer}"


def described(settings: Settings) -> str:
    """Return what the methods keep."""
    columns = f"k {settings.k}" if settings.density is None else f"density {settings.density:g}"
    group = (
        "one choice for the batch" if settings.rows_per_group is None else f"groups of {settings.rows_per_group} rows"
    )
    return f"rows worth {settings.efficiency:.0%}; top-k and MSBP: {columns}, {group}"


def numbers(results: Mapping[str, Result]) -> dict[str, dict[str, object]]:
    """Return everything that was measured, by method."""
    fields = ("seconds", "loss", "accuracy", "step_ms", "backward_ms", "kept", "density")
    return {name: {field: getattr(result, field) for field in fields} for name, result in results.items()}


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.2f} s"


def _ratio(dense: float, sparse: float) -> float:
    return dense / sparse if sparse > 0 else float("nan")
