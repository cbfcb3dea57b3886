"""Loss and accuracy over wall-clock time, one line a method."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from msbp_jax.demo.run import Result


def draw(path: pathlib.Path, title: str, results: Mapping[str, Result]) -> None:
    """Write the picture.

    Args:
      path: File to write, PNG by its content.
      title: Heading.
      results: What to draw.
    """
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, result in results.items():
        left.plot(result.seconds, result.loss, marker=".", label=name)
        right.plot(result.seconds, [100 * share for share in result.accuracy], marker=".", label=name)
    left.set(xlabel="seconds of training, without compilation", ylabel="training loss", yscale="log")
    right.set(xlabel="seconds of training, without compilation", ylabel="test accuracy, %")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, format="png", dpi=120)
