"""Every example runs, learns, and stays short."""

import importlib.util
import pathlib

import jax
import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parents[2] / "examples").glob("*.py"))


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "plan", "plain_jax", "custom_sparsifier"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.caches
def test_example(path, capsys):
    assert len(path.read_text().splitlines()) <= 120
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Optax's Adam promotes dtypes and Flax's attention ranks, which the strict session would refuse.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        losses = module.main(steps=40)
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]
    assert "loss" in capsys.readouterr().out
