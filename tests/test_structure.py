"""The layout holds: a stage imports only what stands above it, and every public name is documented and runs."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import pytest

import msbp_jax as msbp

ROOT = pathlib.Path(msbp.__file__).parent
README = ROOT.parent / "README.md"

# From top to bottom; each may import itself and what stands above it.
STAGES = [
    "_compat",
    "_checks",
    "_freed_memory",
    "formats",
    "weights",
    "kernels",
    "dynamic",
    "sparsifiers",
    "memory",
    "carriers",
    "rules",
    "transform",
    "training",
    "nnx",
    "subnetworks",
    "testing",
]
FLAX = {
    "weights/_pattern.py",
    "transform/sparse_weights.py",
    "transform/_sparse_nnx.py",
    "transform/_linen.py",
    "transform/_nnx.py",
    "subnetworks/_narrow.py",
    "subnetworks/_sample.py",
    "subnetworks/_structure.py",
    "training/_train_state.py",
    "training/_dynamic_scale.py",
    "nnx.py",
    "demo/model.py",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"{node.module}.{alias.name}" for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = {str(path.relative_to(ROOT)): set(imports(path)) for path in sorted(ROOT.rglob("*.py"))}


STAGE_OF = {file: file.split("/")[0].removesuffix(".py") for file in FILES}


def test_every_file_is_of_a_stage():
    """But the package's own, and the demo, which is a user of it."""
    assert set(STAGE_OF.values()) == {*STAGES, "__init__", "demo"}


@pytest.mark.parametrize("file", [file for file, own in STAGE_OF.items() if own in STAGES])
def test_stages_import_only_what_stands_above_them(file):
    own = STAGE_OF[file]
    used = {name.split(".")[1] for name in FILES[file] if name.startswith("msbp_jax.")}
    assert used <= set(STAGES[: STAGES.index(own) + 1])
    if own == "rules":
        assert "memory" not in used  # rules never learn that memory exists
    if own in ("sparsifiers", "memory"):
        assert not any(re.match(r"msbp_jax\.kernels\..*\.(native|dense|xla|cpu|gpu|tpu)", name) for name in FILES[file])


@pytest.mark.parametrize("file", FILES)
def test_private_jax_and_flax_stay_where_they_belong(file):
    assert not any("jax._src" in name for name in FILES[file])
    if not file.startswith("_compat/"):
        assert not any(name.startswith(("jax.extend", "jax.core", "jax.interpreters")) for name in FILES[file])
    if file not in FLAX:
        assert not any(name.startswith("flax") for name in FILES[file])


@pytest.mark.parametrize("file", FILES)
def test_files_are_small(file):
    assert len((ROOT / file).read_text().splitlines()) <= 350


PUBLIC = [name for name in vars(msbp) if not name.startswith("_") and not inspect.ismodule(getattr(msbp, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(msbp, name)
    doc = inspect.getdoc(value)
    assert doc
    assert doc.splitlines()[0].endswith(".")
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
        assert signature.return_annotation is not signature.empty
        assert "Example:" in doc
        if signature.parameters and name not in ("backends",):
            assert "Args:" in doc
            assert all(f"{p}:" in doc for p in signature.parameters)


def test_the_contract_s_names_are_there():
    names = {"sparse_vjp", "top_k", "random_k", "memorized", "dense", "value_and_grad", "TrainState", "train_step"}
    assert names | {"diagnose", "testing", "Sparsifier", "backends"} <= set(vars(msbp))
    assert re.match(r"\d+\.\d+", msbp.__version__)


MODULES = [
    "msbp_jax",
    *(m.name for m in pkgutil.walk_packages([str(ROOT)], "msbp_jax.") if not m.name.endswith(("__main__", "._native"))),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    with jax.numpy_dtype_promotion("standard"):
        failures, attempted = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0
    assert attempted == len(re.findall(r"^\s*>>> ", inspect.getsource(module), re.MULTILINE))  # none is passed over


@pytest.mark.slow
def test_readme_code():
    """The blocks of the README run one after the other, as somebody who follows it would."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(README), "exec"), scope)
    assert float(scope["loss"]) < 2.0
