"""Training by subnetworks runs, small, beside narrower and pruned networks, and goes on where it stopped."""

import json

import numpy as np
import pytest

from benchmarks.subnetwork import __main__ as command
from benchmarks.subnetwork import methods, tasks, variance

pytestmark = pytest.mark.slow


def check(task, method, found):
    """Check a run at half of the units."""
    whole = sum(task.widths.values())
    assert 0 <= found["accuracy"] <= 100
    assert found["seconds"] > 0
    assert found["programs"] >= 1
    assert abs(found["units"] - whole / 2) <= (whole / 4 if method == "subnetworks" else 1)


@pytest.mark.parametrize("method", ["subnetworks", "magnitude"])  # a narrow network has no part of its own
def test_every_method_ends_with_as_many_units(method):
    """Of the MLP it is looked at where it is run from the command line."""
    task = tasks.make("cnn", None, small=True)
    check(task, method, methods.METHODS[method](task, 0.5, 0))


def test_variances(monkeypatch):
    monkeypatch.setattr(variance, "DRAWS", 40)
    for row in variance.measure(tasks.make("mlp", None, small=True), 0.5):
        assert row["no baseline / VR-PGE"] > 1
        assert row["running mean / VR-PGE"] > 0


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variance, "DRAWS", 3)
    arguments = [
        "--tasks",
        "mlp",
        "--small",
        "--seeds",
        "1",
        "--shares",
        "0.5",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    command.main(arguments)
    files = sorted((tmp_path / "train").iterdir())
    assert len(files) == 1 + len(methods.METHODS)
    runs = {run["method"]: run for run in (json.loads(file.read_text()) for file in files)}
    assert np.isfinite(runs["dense"]["accuracy"])
    for method in methods.METHODS:
        check(tasks.make("mlp", None, small=True), method, runs[method])
    monkeypatch.setattr(methods, "dense", None)  # nothing is run again
    command.main(["train", *arguments])
    assert "| subnetworks | 0.5 |" in capsys.readouterr().out
    assert "dense/step" in (tmp_path / "steps_mlp.md").read_text()
