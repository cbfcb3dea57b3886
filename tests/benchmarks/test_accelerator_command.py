"""All that a GPU or TPU is to measure, in minute sizes."""

import json

import pytest

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import unbiased
from benchmarks.accelerator.setting import Setting
from benchmarks.helpers import language_model


def test_accelerator(tmp_path, capsys):
    """Here the kernels are interpreted: their errors are looked at, and they are not timed."""
    arguments = ["--small", "--out", str(tmp_path)]
    accelerator.main(arguments)
    result = json.loads((tmp_path / "accelerator.json").read_text())
    assert list(result) == ["rates", "errors", "layers", "pieces", "unbiased", "transformer"]
    rows = {name: part["rows"] for name, part in result.items()}
    assert {row["backend"] for row in rows["errors"]} == {"xla", "gpu", "tpu"}
    for row in rows["errors"]:
        assert float(row["dx"]) < 1e-5
        assert float(row["dw"]) < 1e-5
    assert [row["r"] for row in rows["layers"]] == [16, "all"]
    for row in rows["layers"]:
        assert row["dense/chosen"] > 0
        assert row["chosen/floor"] >= 0  # rounded; what is interpreted is no measure of a floor
        assert "dense/xla" in row
        assert not {"dense/gpu", "dense/tpu"} & set(row)
    assert [row["backward"] for row in rows["transformer"]] == ["dense", "MSBP", "half of the sequences"]
    assert all(row["dense/whole"] > 0 for row in rows["unbiased"])
    assert all({"read g", "turn w", "select, xla", "dx, xla", "dw, xla"} <= set(row) for row in rows["pieces"])
    assert "## layers" in (tmp_path / "accelerator.md").read_text()
    capsys.readouterr()
    accelerator.main(arguments)
    assert capsys.readouterr().out.count("--again measures it again") == 6
    assert json.loads((tmp_path / "accelerator.json").read_text()) == result


def test_the_methods_of_the_full_run_are_there():
    """The small run has some of them only."""
    assert set(Setting().backwards) <= set(language_model.methods(1 / 8, 1024))
    assert Setting().unbiased == tuple(unbiased.METHODS)


def test_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        accelerator.main([])
    assert "no GPU or TPU" in capsys.readouterr().err
