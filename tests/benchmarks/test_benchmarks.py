"""Every part of the benchmarks runs, small; what it measures is not looked at here."""

import functools
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import pytest

import msbp_jax as msbp
from benchmarks import __main__ as command
from benchmarks import accelerator, choice, convolutions, gradients, layers, models, repeated_sites, steps
from benchmarks.peers import Torch


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(layers, "SHAPES", ((16, 24, 80),))
    monkeypatch.setattr(layers, "DENSITIES", (0.1,))
    monkeypatch.setattr(layers, "GROUPS", {"1": 1, "all": None})
    monkeypatch.setattr(choice, "SHAPES", ((16, 24, 80),))
    monkeypatch.setattr(choice, "DENSITIES", (0.1, 0.5))
    monkeypatch.setattr(choice, "GROUPS", (1, None))
    x, y = jnp.ones((8, 784)), jnp.zeros(8, jnp.int32)
    small = [models.Setting("MLP", models.MLP(64, 3), x, y, 4, (64, 3, 8))]
    monkeypatch.setattr(convolutions, "LAYERS", (convolutions.Layer(2, 6, 16, 16, 3, 1),))
    monkeypatch.setattr(steps, "large_transformer", lambda: small[0])
    monkeypatch.setattr(steps, "settings", lambda: small)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


PARTS = [["layers", "layout"], ["select", "gradients", "memory"], ["steps", "conv", "transformer"], ["choice"]]


@pytest.mark.parametrize("parts", PARTS)
def test_every_part_but_compiling(parts, tmp_path, monkeypatch, capsys):
    extra = ["--fit"] if parts == ["choice"] else []
    monkeypatch.setattr(sys, "argv", ["benchmarks", *parts, "--rounds", "1", "--out", str(tmp_path), *extra])
    command.main()
    if extra:
        assert '"dense": (' in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result) == set(parts)
    assert all(result[part]["rows"] and result[part]["machine"]["jax"] for part in parts)
    assert (tmp_path / "steps.png").exists() == ("steps" in parts)
    assert f"## {parts[0]}" in (tmp_path / "results.md").read_text()


def test_accelerator(tmp_path, monkeypatch, capsys):
    """All that a GPU or TPU is to measure; here the kernels are interpreted."""
    accelerator.main(["--small", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "accelerator.json").read_text())
    assert {row["backend"] for row in result["errors"]} == {"xla", "gpu", "tpu"}
    for row in result["errors"]:
        assert float(row["dx"]) < 1e-5
        assert float(row["dw"]) < 1e-5
    assert [row["r"] for row in result["layers"]] == [16, "all"]
    assert all(row["dense/chosen"] > 0 and row["chosen/floor"] > 0 for row in result["layers"])
    assert [row["backward"] for row in result["transformer"]] == ["dense", "MSBP 1/8"]
    assert "## layers" in (tmp_path / "accelerator.md").read_text()
    with pytest.raises(SystemExit):
        accelerator.main([])
    assert "no GPU or TPU" in capsys.readouterr().err


def test_an_absent_peer_is_a_reason(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    broken.chmod(0o755)
    torch = Torch(str(broken))
    assert "PyTorch did not start: no such module. Install msbp-jax[bench]." in torch.reason
    torch.close()


def test_settings_and_gradients(monkeypatch):
    monkeypatch.undo()
    assert len(models.settings()) == 6
    g = gradients.recorded(12, 72, steps=1)
    assert g.shape == (12, 72)
    assert float(jnp.abs(g).max()) > 0


def test_repeated_sites(tmp_path, monkeypatch):
    """With copies of the weights for each step there is a memory for each, and the loss is the same."""
    monkeypatch.setattr(repeated_sites, "HIDDEN", 16)
    monkeypatch.setattr(repeated_sites.lstm_tagger, "LENGTH", 4)
    monkeypatch.setattr(repeated_sites, "accuracy", lambda f, data, count, seed: float(count))
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["repeated_sites", "--steps", "2", "--seeds", "1", "--out", str(out)])
    repeated_sites.main()
    assert len(json.loads(out.read_text())["variants"]) == 8
    monkeypatch.undo()
    monkeypatch.setattr(repeated_sites, "HIDDEN", 16)
    data = repeated_sites.lstm_tagger.encode(*repeated_sites.lstm_tagger.load(None))
    params = repeated_sites.init(jax.random.key(0), *data[2:])
    words, suffixes = (data[0][name][:4] for name in ("words", "suffixes"))
    for uses, shape in (("one", (64,)), ("each", (32, 64))):
        f = msbp.sparse_vjp(
            functools.partial(repeated_sites.tagger, steps=uses, tied=uses),
            {"forward/*": msbp.memorized(msbp.top_k(k=3), decay=0.8)},
            min_features=1,
        )
        assert f.init_memory(params, words, suffixes)["forward/w"].residual.shape == shape
    f = msbp.sparse_vjp(functools.partial(repeated_sites.tagger, steps="one", tied=""), msbp.top_k(k=3), min_features=1)
    assert 0 <= repeated_sites.accuracy(f, data, 1, 0) <= 100


def test_the_worker_is_what_the_peers_run():
    torch = pytest.importorskip("torch")
    torch_worker = importlib.import_module("benchmarks.torch_worker")
    call = torch_worker.layer(8, 6, 20, 0.2, "meProp unified")
    dx, dw = call()
    assert dx.shape == (8, 6)
    assert int((dw.abs().sum(1) > 0).sum()) == 4
    assert torch.isfinite(dx).all()
