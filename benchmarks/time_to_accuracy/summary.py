"""The runs of a task as a table and a plot.

The target is the mean accuracy that the best dense batch size reaches in the largest budget. What a method reaches at
each budget, decayed to it, is a curve; where it crosses the target is the method's time. The interval is that of
resampled seeds (the bootstrap of SciPy); a method that does not cross it gets none.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.helpers.tables import markdown

type Run = dict[str, Any]

_RESAMPLES = 2000


def write(folder: pathlib.Path, task: str, runs: Sequence[Run]) -> str:
    """Write `TASK.md` and `TASK.png`; return the table.

    Args:
      folder: Where.
      task: Its name.
      runs: All that count.
    """
    rows = table(runs)
    target = rows[0].get("target, %")
    machine = runs[0]["machine"]
    instructions = (machine["instruction sets"] or ["no native kernels"])[0]
    seeds = len({run["seed"] for run in runs})
    head = (
        f"# Time to accuracy: {task}\n\n"
        f"Written by `python -m benchmarks.time_to_accuracy {task}`, {runs[-1]['date']}, "
        f"{machine['processor']} ({instructions}), JAX {machine['jax']}, {seeds} seeds. Accuracy on the test set in "
        "percent, mean and standard deviation over seeds, after each budget of seconds, to which the learning rate is "
        "decayed. "
        f"Time: how many times sooner than the best dense batch size a method reaches {target} %, with a 95 % "
        "interval over resampled seeds, 0 where they do not reach it.\n\n"
    )
    text = head + markdown([{key: value for key, value in row.items() if key != "target, %"} for row in rows]) + "\n"
    (folder / f"{task}.md").write_text(text)
    _plot(folder / f"{task}.png", task, runs)
    return text


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row a method."""
    budgets = sorted({run["budget"] for run in runs})
    names = list(dict.fromkeys(run["method"] for run in runs))
    finals = {name: np.array([_finals(runs, name, budget) for budget in budgets]) for name in names}
    dense = [name for name in names if name.startswith("dense")]
    best = max(dense, key=lambda name: finals[name][-1].mean(), default="")
    target = float(finals[best][-1].mean()) if best else float("nan")
    rows = []
    for name in names:
        own = [run for run in runs if run["method"] == name]
        row: dict[str, Any] = {"method": name, "rate": own[0]["rate"], "batch": own[0]["batch"]}
        for budget, reached in zip(budgets, finals[name], strict=True):
            row[f"{budget:g} s"] = f"{reached.mean():.2f} ± {reached.std(ddof=min(1, len(reached) - 1)):.2f}"
        row["loss at the end"] = round(
            float(np.mean([run["points"][-1]["loss"] for run in own if run["budget"] == budgets[-1]])), 4
        )
        row["mean density"] = round(float(np.mean([point["density"] for run in own for point in run["points"]])), 3)
        row["time"] = _ratio(budgets, finals, best, name) if best else "-"
        row["target, %"] = round(target, 2)
        rows.append(row)
    return rows


def _finals(runs: Sequence[Run], name: str, budget: float) -> list[float]:
    return [run["points"][-1]["accuracy"] for run in runs if (run["method"], run["budget"]) == (name, budget)]


def _ratio(budgets: Sequence[float], finals: Mapping[str, np.ndarray], best: str, name: str) -> str:
    """Return how many times sooner than the best dense one a method reaches its accuracy, with an interval."""
    draw = np.random.default_rng(0)
    target = finals[best][-1].mean()
    at = crossing(budgets, finals[name].mean(axis=1), target)
    if at is None:
        return "not reached"
    seeds = finals[name].shape[1]
    resampled = []
    for _ in range(_RESAMPLES):
        chosen = draw.integers(0, seeds, seeds)
        goal = finals[best][-1][chosen].mean()
        found = crossing(budgets, finals[name][:, chosen].mean(axis=1), goal)
        resampled.append(budgets[-1] / found if found is not None else 0.0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{budgets[-1] / at:.2f}x ({low:.2f} to {high:.2f})"


def crossing(budgets: Sequence[float], reached: Sequence[float] | np.ndarray, target: float) -> float | None:
    """Return the budget at which a curve through points reaches a target, linear between them; None if it does not.

    A curve that begins above the target has its first budget: it may have been there sooner.
    """
    for number, (budget, value) in enumerate(zip(budgets, reached, strict=True)):
        if value >= target:
            if number == 0:
                return float(budget)
            before, below = budgets[number - 1], reached[number - 1]
            return float(before + (budget - before) * (target - below) / (value - below))
    return None


def _plot(path: pathlib.Path, task: str, runs: Sequence[Run]) -> None:
    """Draw accuracy and loss against the clock, of the runs of the largest budget, mean over seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    largest = max(run["budget"] for run in runs)
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run["points"] for run in runs if run["method"] == name and run["budget"] == largest]
        length = min(map(len, own))
        mean = lambda key, own=own, length=length: np.mean(
            [[p[key] for p in points[:length]] for points in own], axis=0
        )
        style = "--" if name.startswith("dense") else "-"
        left.plot(mean("seconds"), mean("accuracy"), style, marker=".", label=name)
        right.plot(mean("seconds"), mean("loss"), style, marker=".", label=name)
    left.set(xlabel="seconds of training", ylabel="test accuracy, %")
    right.set(xlabel="seconds of training", ylabel="training loss", yscale="log")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
    left.legend(fontsize="small")
    figure.suptitle(f"{task}: budget of {largest:g} s")
    figure.savefig(path, format="png", dpi=110)
