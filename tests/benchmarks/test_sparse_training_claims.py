"""Sparse training from scratch runs, small, by every method, and goes on where it stopped."""

import json

import pytest

from benchmarks.sparse_training import __main__ as command
from benchmarks.sparse_training import methods, tasks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_every_method_ends_with_as_many_entries(name):
    task = tasks.make(name, None, small=True)
    # What only the convolutional network has: moments under a mask of decay, and a dense gradient that stands apart.
    for method in methods.METHODS if name == "mlp" else ("rigl", "gradual"):
        found = methods.run(method, task, 0)
        assert 0 <= found["accuracy"] <= 100
        epochs = 3 if method == "longer" else task.epochs
        assert len(found["accuracies"]) == len(found["seconds after epochs"]) == epochs
        assert found["seconds"] > 0
        assert found["density in the end"] == pytest.approx(1 if method == "dense" else task.density, abs=0.01)
        assert (found["pattern bytes"] > 0) == (method != "dense")
        assert [stage["steps"] for stage in found["stages"]] == {
            "gradual": [1, 5, 2],
            "early": [1, 3, 4],
            "longer": [1, 5, 6],
        }.get(method, [8])
        programs = dict.fromkeys(methods.GRADUAL, 3) | {"rigl": 1 if name == "mlp" else 4}
        assert found["programs"] == programs.get(method, 1)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["nerva", "--small", "--seeds", "1", "--methods", "dense", "gradual", "--out", str(tmp_path)]
    command.main(arguments)
    files = sorted((tmp_path / "runs").iterdir())
    assert len(files) == 2
    assert {json.loads(file.read_text())["method"] for file in files} == {"dense", "gradual"}
    monkeypatch.setattr(methods, "run", None)  # nothing is run again
    command.main(arguments)
    assert "x faster to the end" in capsys.readouterr().out
    assert "| gradual | 0.2 |" in (tmp_path / "nerva.md").read_text()


def test_time_to_the_dense_accuracy():
    run = lambda *accuracies: {"accuracies": accuracies, "accuracy": accuracies[-1], "seconds after epochs": [1.0, 3.0]}
    dense = [run(90.0, 98.0), run(90.0, 98.0)]
    assert command._reached([run(97.6, 97.0), run(97.0, 97.5)], dense) == "2.0"
    assert command._reached([run(97.6, 97.0), run(97.0, 97.4)], dense) == "reached by 1 of 2"
    assert command._reached([run(97.0, 97.0), run(97.0, 97.4)], dense) == "not reached"
