"""Measuring, helpers, data and studies are apart, each with its entry; none of it leans on the demo or the examples."""

import ast
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.helpers import paths, tables
from benchmarks.helpers.records import finished
from benchmarks.suite.parts import PARTS, place

ROOT = pathlib.Path(__file__).parents[2]
FILES = [str(path.relative_to(ROOT)) for part in ("benchmarks", "studies") for path in (ROOT / part).rglob("*.py")]

# What each folder may import of the others.
FOLDERS = {
    "benchmarks/data": set(),
    "benchmarks/helpers": {"benchmarks.data"},
    "benchmarks/suite": {"benchmarks.helpers"},
    "benchmarks/accelerator": {"benchmarks.helpers", "benchmarks.data"},
    "benchmarks/dithered": {"benchmarks.helpers", "benchmarks.data"},
    "benchmarks/sparse_training": {"benchmarks.helpers", "benchmarks.data"},
    "benchmarks/subnetwork": {"benchmarks.helpers", "benchmarks.data"},
    "benchmarks/time_to_accuracy": {"benchmarks.helpers", "benchmarks.data"},
    "benchmarks": {"benchmarks.helpers", "benchmarks.suite"},
    "studies": {"benchmarks.helpers", "benchmarks.data"},
}


def imports(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", sorted(FILES))
def test_imports(file):
    folder = str(pathlib.PurePosixPath(file).parent)
    own, allowed = folder.replace("/", "."), FOLDERS[folder]
    for name in imports(file):
        assert not name.startswith(("msbp_jax.demo", "examples")), name
        if name.startswith(("benchmarks", "studies")):
            assert name.startswith(own) or any(name.startswith(other) for other in allowed), name


@pytest.mark.parametrize("file", sorted(FILES))
def test_only_entries_have_a_main(file):
    """The worker is one too: a process of its own, which an interpreter without JAX runs."""
    entry = file.endswith("__main__.py") or file == "benchmarks/helpers/torch_worker.py"
    assert ('__name__ == "__main__"' in (ROOT / file).read_text()) == entry
    assert len((ROOT / file).read_text().splitlines()) <= 350


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (["benchmarks"], [*PARTS, "--again", "--small"]),
        (["benchmarks.accelerator"], ["rates", "transformer", "--again", "--small"]),
        (["benchmarks.time_to_accuracy"], ["mnist", "--only", "--small"]),
        (["benchmarks.dithered"], ["zeros", "workers", "--small"]),
        (["benchmarks.subnetwork"], ["steps", "train", "--small"]),
        (["studies"], ["accuracy", "language_model", "repeated_sites"]),
        (["studies", "accuracy"], ["--data", "--out", "--epochs"]),
    ],
)
def test_entries_say_what_they_do(entry, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"{entry[0]}.__main__").main([*entry[1:], "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m {' '.join(entry)}")
    assert [word for word in expected if word not in said] == []


@pytest.mark.parametrize("package", ["benchmarks", "studies"])
def test_packages_are_commands(package):
    command = [sys.executable, "-m", package, "--help"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.startswith(f"usage: python -m {package}")


def test_results_are_their_parts_put_together():
    parts = finished(paths.RESULTS / "parts")
    ordered = {name: parts[name] for name in sorted(parts, key=place)}
    assert (paths.RESULTS / "results.json").read_text() == tables.as_json(ordered)
    assert (paths.RESULTS / "results.md").read_text() == tables.as_markdown(ordered, "Results", "python -m benchmarks")
    assert set(json.loads((paths.RESULTS / "results.json").read_text())) >= set(PARTS)
