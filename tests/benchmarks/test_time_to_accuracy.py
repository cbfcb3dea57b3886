"""The harness runs, small; goes on where it stopped; and its summary says what the runs say."""

import json

import numpy as np
import pytest

import msbp_jax as msbp
from benchmarks.time_to_accuracy import __main__ as command
from benchmarks.time_to_accuracy import methods, summary, tasks
from benchmarks.time_to_accuracy.train import Trainer
from msbp_jax.testing import random_gradient


def test_a_task_from_the_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["mnist", "--small", "--out", str(tmp_path), "--only", "dense", "rows .95"]
    command.main(arguments)
    files = sorted(file.name for file in (tmp_path / "mnist").iterdir())
    assert len(files) == 2 * (2 + 3)  # two rates are tried, and three budgets run
    found = json.loads((tmp_path / "mnist" / "rows_95_rate_0_05_seed_1000_budget_0_4.json").read_text())
    assert (found["method"], found["batch"], found["rate"]) == ("rows .95", 32, 0.05)
    last = found["points"][-1]
    assert last["seconds"] >= 0.4
    assert 10 < last["accuracy"] <= 100
    assert 0 < last["density"] <= 1
    assert (tmp_path / "mnist.png").stat().st_size > 1000
    assert "| rows .95 |" in (tmp_path / "mnist.md").read_text()
    monkeypatch.setattr(command, "Trainer", None)  # nothing is run again
    command.main(arguments)
    assert "| dense |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("tagger", "rows .9"),
        ("transformer", "uniform rows"),
        ("cnn", "MSBP"),
        ("cnn_norm", "rows .95"),
        ("language", "rows .95"),
    ],
)
def test_every_task(name, method):
    task = tasks.make(name, None, small=True)
    assert method in methods.NAMES
    points = list(Trainer(task, methods.make(task, method, 0.5)).run(task.rates[0], 0, 0.1))
    assert all(np.isfinite([point.loss, point.accuracy]).all() for point in points)
    assert method != methods.UNIFORM or points[-1].density == 0.5
    assert points[-1].seconds >= 0.1 or task.epochs is not None
    assert points[-1].examples <= task.examples or task.epochs is None


def test_uniform_rows_are_unbiased_and_as_many_as_asked_for():
    msbp.testing.check_sparsifier(methods.uniform_rows(0.25), unbiased=True)
    u = random_gradient(0, 20, 8)
    s = methods.uniform_rows(0.25)
    p, _ = s.apply(u, s.init(u))
    assert (int((p.weight != 0).sum()), float(p.weight.max())) == (5, 4.0)


def run(method, budget, seed, accuracy, rate=0.1):
    points = [{"seconds": budget, "examples": 1, "loss": 0.5, "accuracy": accuracy, "density": 0.5}]
    machine = {"processor": "a", "instruction sets": [], "jax": "b"}
    return {"method": method, "rate": rate, "batch": 8, "seed": seed, "budget": budget, "points": points,
            "date": "today", "machine": machine}  # fmt: skip


def test_the_time_to_the_best_dense_accuracy():
    reached = {
        "dense": [(5, 80), (10, 90), (20, 95)],
        "dense B/2": [(5, 82), (10, 91), (20, 94)],
        "rows": [(5, 85), (10, 95), (20, 96)],
        "lame": [(5, 50), (10, 60), (20, 70)],
    }
    runs = [run(name, budget, seed, value + seed) for name, of in reached.items() for budget, value in of
            for seed in (0, 1)]  # fmt: skip
    rows = {row["method"]: row for row in summary.table(runs)}
    assert rows["dense"]["target, %"] == 95.5
    assert rows["rows"]["10 s"] == "95.50 ± 0.71"
    assert rows["rows"]["time"] == "2.00x (2.00 to 2.00)"
    assert rows["dense"]["time"] == "1.00x (1.00 to 1.00)"
    assert rows["lame"]["time"] == "not reached"


def test_where_a_curve_crosses_a_target():
    assert summary.crossing([5, 10, 20], [80, 90, 94], 92) == 15
    assert summary.crossing([5, 10], [80, 90], 80) == 5
    assert summary.crossing([5, 10], [80, 90], 91) is None
