"""The checks of what is claimed of dithering run, small; go on where they stopped; and say what their runs say."""

import json

import numpy as np
import pytest

import msbp_jax as msbp
from benchmarks.dithered import __main__ as command
from benchmarks.dithered import networks, training, workers

pytestmark = pytest.mark.slow


def check(name, dithered, found):
    """Check a run of two epochs."""
    assert len(found["accuracy"]) == len(found["loss"]) == networks.make(name, None, small=True).epochs
    assert np.isfinite(found["loss"]).all()
    layers = [key for key in found["told"][-1] if key.endswith("kernel/density")]
    assert len(layers) == ({"mlp": 3, "lenet": 4, "cifar": 4}[name] if dithered else 0)
    assert all(0 < found["told"][-1][key] < 1 for key in layers)


@pytest.mark.parametrize("name", ["lenet", "cifar"])
def test_every_network_trains_dense_and_dithered(name):
    """The MLP is looked at where it is run from the command line."""
    task = networks.make(name, None, small=True)
    for plan in (None, msbp.dithered(2, bits=8)):
        check(name, plan is not None, training.train(task, plan, 0))


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SCALES", (2,))
    monkeypatch.setattr(command, "IN_8_BITS", (2,))
    arguments = ["zeros", "--tasks", "mlp", "--small", "--seeds", "2", "--out", str(tmp_path)]
    command.main(arguments)
    files = sorted((tmp_path / "zeros").iterdir())
    assert len(files) == 3 * 2
    for found in (json.loads(file.read_text()) for file in files):
        check("mlp", found["plan"] != "dense", found)
    assert (found["task"], found["seed"]) == ("mlp", 1)
    monkeypatch.setattr(training, "train", None)  # nothing is run again
    command.main(arguments)
    said = capsys.readouterr().out
    assert "| scale 2, 8 bits |" in said
    assert "| dense |" in said


def test_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "WORKERS", (1, 4))
    command.main(["workers", "--small", "--seeds", "1", "--out", str(tmp_path)])
    text = (tmp_path / "workers.md").read_text()
    assert "| 4 | 4 (sqrt(N)) |" in text
    assert text.count("\n| 1 |") == 3
    # One worker and many have the gradient of all where nothing is dithered.
    runs = [json.loads(file.read_text()) for file in (tmp_path / "workers").iterdir()]
    dense = {run["workers"]: run["loss"] for run in runs if run["scale"] == "none"}
    np.testing.assert_allclose(dense[1], dense[4], rtol=1e-4)


def test_too_few_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "WORKERS", (64,))
    with pytest.raises(SystemExit, match=r"wants 64 devices, and there are 8\..*device_count=64"):
        command.main(["workers", "--small", "--out", str(tmp_path)])


@pytest.mark.parametrize(("symbols", "bits"), [([0, 0, 0, 0], 0), ([0, 1, 0, 1], 1), ([0, 1, 2, 3], 2)])
def test_entropy(symbols, bits):
    assert workers.entropy(np.array(symbols)) == pytest.approx(bits)
