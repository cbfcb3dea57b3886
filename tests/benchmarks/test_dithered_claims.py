"""The checks of what is claimed of dithering run, small; go on where they stopped; and say what their runs say."""

import json

import numpy as np
import pytest

import msbp_jax as msbp
from benchmarks.dithered import __main__ as command
from benchmarks.dithered import networks, training, workers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["mlp", "lenet", "cifar"])
def test_every_network_trains_dense_and_dithered(name):
    task = networks.make(name, None, small=True)
    for plan in (None, msbp.dithered(2, bits=8)):
        found = training.train(task, plan, 0)
        assert len(found["accuracy"]) == len(found["loss"]) == task.epochs
        assert np.isfinite(found["loss"]).all()
        layers = [key for key in found["told"][-1] if key.endswith("kernel/density")]
        assert len(layers) == (0 if plan is None else {"mlp": 3, "lenet": 4, "cifar": 4}[name])
        assert all(0 < found["told"][-1][key] < 1 for key in layers)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SCALES", (2,))
    monkeypatch.setattr(command, "IN_8_BITS", (2,))
    arguments = ["zeros", "--tasks", "mlp", "--small", "--seeds", "2", "--out", str(tmp_path)]
    command.main(arguments)
    files = sorted((tmp_path / "zeros").iterdir())
    assert len(files) == 3 * 2
    found = json.loads(files[0].read_text())
    assert (found["task"], found["seed"]) == ("mlp", 0)
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


def test_one_worker_and_many_have_the_gradient_of_all_where_nothing_is_dithered():
    task = networks.make("mlp", None, small=True)
    one, many = (workers.train(task, None, number, 64, 0) for number in (1, 4))
    np.testing.assert_allclose(one["loss"], many["loss"], rtol=1e-4)


def test_too_few_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "WORKERS", (64,))
    with pytest.raises(SystemExit, match=r"wants 64 devices, and there are 8\..*device_count=64"):
        command.main(["workers", "--small", "--out", str(tmp_path)])


@pytest.mark.parametrize(("symbols", "bits"), [([0, 0, 0, 0], 0), ([0, 1, 0, 1], 1), ([0, 1, 2, 3], 2)])
def test_entropy(symbols, bits):
    assert workers.entropy(np.array(symbols)) == pytest.approx(bits)
