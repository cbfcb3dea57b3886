"""Every part of the suite runs, small; what it measures is not looked at here, but what it times is."""

import importlib
import json
import re

import jax
import jax.numpy as jnp
import pytest

import msbp_jax as msbp
from benchmarks import __main__ as command
from benchmarks.helpers import backends, gradients, networks, paths
from benchmarks.helpers.peers import Torch
from benchmarks.suite.parts import PARTS, place

# Those with a picture last: it is drawn again after each part that follows.
GROUPS = [
    ["targets", "layout", "layers"],
    ["select", "gradients", "memory", "freed memory"],
    ["transformer", "steps"],
    ["rows", "padding", "entries", "devices"],
    ["weights", "weight steps"],
    ["sparse conv", "sparse conv steps"],
    ["compile", "conv", "kept images"],
    ["step costs", "predictions"],
]


@pytest.mark.parametrize("parts", [*GROUPS, ["choice"]])
def test_every_part(parts, tmp_path, capsys):
    extra = ["--fit"] if parts == ["choice"] else []
    command.main([*parts, "--small", "--out", str(tmp_path), *extra])
    if extra:
        assert '"dense": (' in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert list(result) == sorted(parts, key=place)
    for part in parts:
        assert result[part]["rows"]
        assert result[part]["machine"]["jax"] == jax.__version__
        assert result[part]["settings"]["small"]
        assert f"## {part}\n" in (tmp_path / "results.md").read_text()
        for row in result[part]["rows"]:
            assert not re.search(r"\b[gt]pu\b", " ".join(row)), "interpreted kernels are not timed"
    for picture in ("layers", "steps"):
        assert (tmp_path / f"{picture}.png").exists() == (picture in parts)


def test_the_parts_are_all_there():
    assert sorted(PARTS) == sorted([*(part for group in GROUPS for part in group), "choice"])
    assert [place("steps (freed memory kept)"), place("steps")] == [(14, "steps (freed memory kept)"), (14, "steps")]


def test_what_is_interpreted_is_not_timed(monkeypatch):
    """By name the Pallas kernels run here; each backend is timed on its own platform, XLA on all."""
    for op, known in msbp.backends().items():
        assert {"gpu", "tpu", "xla"} <= set(known)
        assert set(backends.compiled(op)) == set(known) - {"gpu", "tpu"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert backends.compiled("grad_input") == ("tpu", "xla", "dense")


def test_an_interpreted_kernel_is_never_called(tmp_path, monkeypatch):
    """Not even to warm up: the parts that go through all backends get by without Pallas."""
    from msbp_jax.kernels.pallas import calls

    def run(*_, **__):
        raise AssertionError("a Pallas kernel was called")

    monkeypatch.setattr(calls, "run", run)
    jax.clear_caches()
    with pytest.raises(AssertionError, match="a Pallas kernel was called"):
        msbp.kernels.select(jnp.ones((32, 64)), 4, 16, backend="gpu")
    command.main(["choice", "select", "layout", "--small", "--out", str(tmp_path)])


def test_minute_sizes_do_not_become_results(monkeypatch, tmp_path):
    for name, folder in (("SMALL", tmp_path / "small"), ("RESULTS", tmp_path / "results")):
        monkeypatch.setattr(paths, name, folder)
    command.main(["targets", "--small"])
    assert (tmp_path / "small" / "results.json").exists()
    assert not (tmp_path / "results").exists()


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["stpes"])
    assert "invalid choice: 'stpes'" in capsys.readouterr().err


def test_an_absent_peer_is_a_reason(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    broken.chmod(0o755)
    torch = Torch(str(broken))
    assert "PyTorch did not start: no such module. Install msbp-jax[bench]." in torch.reason
    assert torch.missing == {"sparseprop": "SparseProp runs with PyTorch."}
    torch.close()


def test_networks_and_gradients():
    assert len(networks.settings()) == 6
    g = gradients.recorded(12, 72, steps=1)
    assert g.shape == (12, 72)
    assert float(jnp.abs(g).max()) > 0


def test_the_worker_is_what_the_peers_run():
    torch = pytest.importorskip("torch")
    torch_worker = importlib.import_module("benchmarks.helpers.torch_worker")
    call = torch_worker.layer(8, 6, 20, 0.2, "meProp unified")
    dx, dw = call()
    assert dx.shape == (8, 6)
    assert int((dw.abs().sum(1) > 0).sum()) == 4
    assert torch.isfinite(dx).all()
    assert torch_worker.linear(8, 6, 20, 0.2, "torch")().shape == (8, 6)
    missing = torch_worker.peers()
    assert not missing or "github.com/IST-DASLab/sparseprop" in missing["sparseprop"]
