"""Training by subnetworks runs, small, beside narrower and pruned networks, and goes on where it stopped."""

import json

import numpy as np
import pytest

from benchmarks.subnetwork import __main__ as command
from benchmarks.subnetwork import methods, tasks, variance

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_every_method_ends_with_as_many_units(name):
    task = tasks.make(name, None, small=True)
    whole = sum(task.widths.values())
    for method, function in methods.METHODS.items():
        if name == "cnn" and method == "narrow":  # which compiles as long as the others and has no part of its own
            continue
        found = function(task, 0.5, 0)
        assert 0 <= found["accuracy"] <= 100
        assert found["seconds"] > 0
        assert found["programs"] >= 1
        assert abs(found["units"] - whole / 2) <= (whole / 4 if method == "subnetworks" else 1)


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
    assert np.isfinite(json.loads(files[0].read_text())["accuracy"])
    monkeypatch.setattr(methods, "dense", None)  # nothing is run again
    command.main(["train", *arguments])
    assert "| subnetworks | 0.5 |" in capsys.readouterr().out
    assert "dense/step" in (tmp_path / "steps_mlp.md").read_text()
