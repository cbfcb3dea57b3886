"""Every study runs, small, from the one command line, and writes what it found."""

import functools
import json

import jax
import pytest

import msbp_jax as msbp
from benchmarks.data import tagging
from studies import __main__ as command
from studies import repeated_sites


def test_accuracy(tmp_path):
    out = tmp_path / "new" / "accuracy.json"
    arguments = ["--seeds", "2", "--at-once", "2", "--epochs", "1", "--batch", "200", "--only", "MSBP, r=10"]
    command.main(["accuracy", "--out", str(out), *arguments])
    result = json.loads(out.read_text())
    assert (result["data"], result["setting"]["batch"]) == ("digits", 200)
    assert list(result["methods"]) == ["MSBP, r=10"]
    (accuracies,) = result["methods"]["MSBP, r=10"]["test_accuracy"]
    assert len(accuracies) == 2
    assert all(10 < accuracy <= 100 for accuracy in accuracies)


def test_language_model(tmp_path):
    out = tmp_path / "out.json"
    sizes = {"layers": 1, "width": 64, "heads": 2, "length": 32, "batch": 2, "steps": 2}
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command.main(["language_model", "--out", str(out), *arguments, "--only", "MSBP"])
    result = json.loads(out.read_text())
    assert result["size"] == sizes
    assert list(result["methods"]) == ["MSBP"]
    assert all(found["loss"] > 0 and 0 <= found["accuracy, %"] <= 100 for found in result["methods"].values())


def test_sparse_weights(tmp_path):
    out = tmp_path / "out.json"
    command.main(
        ["sparse_weights", "--out", str(out), "--epochs", "2", "--longer", "2", "--width", "64", "--densities", "0.2"]
    )
    runs = json.loads(out.read_text())["runs"]
    told = [(run["part"], run.get("data", ""), run["network"]) for run in runs]
    both = ["dense", "density 0.2"]
    assert told == [
        *(("scratch", "", name) for name in (*both, "density 0.2, 2 x the epochs")),
        *(("nerva", "", name) for name in both),
        ("transfer", "digits, 0 to 4", "dense"),
        *(("transfer", "digits, 5 to 9", name) for name in both),
    ]
    for run in runs:
        assert len(run["accuracy"]) == len(run["seconds"]) == (4 if "x the epochs" in run["network"] else 2)
        assert run["accuracy"][-1] > 15
        assert (run["bytes"]["patterns"] > 0) == (run["network"] != "dense")


def test_repeated_sites(tmp_path, monkeypatch):
    monkeypatch.setattr(repeated_sites, "accuracy", lambda f, data, hidden, count, seed: float(hidden + count + seed))
    out = tmp_path / "out.json"
    arguments = ["--steps", "2", "--seeds", "2", "--hidden", "16", "--length", "4", "--out", str(out)]
    command.main(["repeated_sites", *arguments])
    found = json.loads(out.read_text())["variants"]
    assert len(found) == 8
    assert found["tied: MSBP, one for each use"] == {"mean": 18.5, "seeds": [18.0, 19.0]}


def test_one_memory_for_all_uses_or_one_for_each():
    """With copies of the weights for each step there is a memory for each."""
    data = tagging.load(None, 8)
    params = repeated_sites.init(jax.random.key(0), data.vocabulary, data.tags, 16)
    words, suffixes = (data.train[name][:4] for name in ("words", "suffixes"))
    for uses, shape in (("one", (64,)), ("each", (8, 64))):
        f = msbp.sparse_vjp(
            functools.partial(repeated_sites.tagger, steps=uses, tied=uses),
            {"forward/*": msbp.memorized(msbp.top_k(k=3), decay=0.8)},
            min_features=1,
        )
        assert f.init_memory(params, words, suffixes)["forward/w"].residual.shape == shape
    f = msbp.sparse_vjp(functools.partial(repeated_sites.tagger, steps="one", tied=""), msbp.top_k(k=3), min_features=1)
    assert 0 <= repeated_sites.accuracy(f, data, 16, 1, 0) <= 100


def test_what_was_found_is_written_after_each_method(tmp_path, monkeypatch):
    """What an interrupted study found is kept."""

    def stops_at_the_third(f, data, hidden, count, seed, calls=[]):  # noqa: B006
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 50.0

    monkeypatch.setattr(repeated_sites, "accuracy", stops_at_the_third)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        command.main(["repeated_sites", "--seeds", "1", "--out", str(out)])
    assert list(json.loads(out.read_text())["variants"]) == ["time steps: dense", "time steps: top-k"]


def test_rows(tmp_path):
    out = tmp_path / "out.json"
    sizes = ["--width", "64", "--batch", "128", "--epochs", "2"]
    command.main(["rows", "--out", str(out), *sizes, "--efficiencies", "0.9"])
    result = json.loads(out.read_text())
    assert 0 < result["f"] < 1
    (dense,), (rows,) = result["runs"]["dense"], result["runs"]["rows 0.9"]
    assert dense["speed-up"] == dense["mean density"] == 1
    assert 0 < rows["mean density"] < 1
    assert all(run["loss"][1] < run["loss"][0] for run in (dense, rows))
