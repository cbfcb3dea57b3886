"""Every example runs, learns, and stays short."""

import gzip
import importlib.util
import lzma
import pathlib
import sys
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

EXAMPLES = sorted((pathlib.Path(__file__).parents[2] / "examples").glob("*.py"))
# On data of a user's choice, with a small set of their own; they return an accuracy for each method.
ON_DATA = ("lstm_tagger", "cnn_cifar10", "char_transformer")
OF_METHODS = ("sparse_from_scratch",)  # one method beside the other, on digits or MNIST


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Optax's Adam promotes dtypes and Flax's attention ranks, which the strict session would refuse."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def load(path):
    spec = importlib.util.spec_from_file_location(f"examples_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_there_are_examples():
    small = {"quickstart", "nnx_quickstart", "plain_jax", "equinox_mlp", "haiku_mlp", "plan", "custom_sparsifier"}
    small |= {"prune_and_finetune", "subnetworks"}
    assert {path.stem for path in EXAMPLES} == small | {*ON_DATA, *OF_METHODS}
    assert all(len(path.read_text().splitlines()) < 150 for path in EXAMPLES)


@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if p.stem not in (*ON_DATA, *OF_METHODS)], ids=lambda path: path.stem
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:haiku")
def test_example(path, capsys):
    losses = load(path).main(steps=40)
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "steps", "chance", "smaller"),
    [
        ("lstm_tagger", 25, 0.2, {"LENGTH": 10}),
        ("cnn_cifar10", 25, 0.15, {}),
        ("char_transformer", 10, 0.08, {"LENGTH": 16, "WIDTH": 64}),
    ],
)
def test_example_without_data(name, steps, chance, smaller, capsys, monkeypatch):
    module = load(EXAMPLES[0].with_name(f"{name}.py"))
    for constant, value in smaller.items():
        monkeypatch.setattr(module, constant, value)
    accuracies = module.main(steps=steps, batch=16)
    assert len(accuracies) == 3
    assert all(accuracy > chance for accuracy in accuracies.values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "accuracy" in line] == ["dense", "top-k", "MSBP"]


def test_sparse_from_scratch(tmp_path, capsys):
    module = load(EXAMPLES[0].with_name("sparse_from_scratch.py"))
    accuracies = module.main(steps=80, density=0.2, width=48)
    assert list(accuracies) == ["dense", "static", "SET", "RigL", "gradual"]
    assert min(accuracies.values()) > 0.3
    lines = capsys.readouterr().out.splitlines()
    sizes = [int(line.split()[1].replace(",", "")) for line in lines]
    assert sizes[0] == 64 * 48 + 48 * 48 + 48 * 10 + 48 + 48 + 10
    assert len(set(sizes[1:4])) == 1
    assert max(sizes[1:]) < 0.25 * sizes[0]
    pixels, classes = np.arange(3 * 784) % 256, np.arange(3)
    for part in ("train", "t10k"):  # MNIST's files in miniature
        for name, header, body in (("images-idx3", 16, pixels), ("labels-idx1", 8, classes)):
            packed = gzip.compress(bytes(header) + body.astype(np.uint8).tobytes())
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(packed)
    (x, y), _ = module.load(tmp_path)
    assert x.shape == (3, 784)
    assert x.max() == 1
    assert y.tolist() == [0, 1, 2]


def test_readers_of_real_data(tmp_path):
    """The files that the examples take, in miniature."""
    tagger, cnn, transformer = (load(EXAMPLES[0].with_name(f"{name}.py")) for name in ON_DATA)
    words = [("1", "Dogs", "NOUN"), ("1.1", "x", "X"), ("2", "Run", "VERB")]
    rows = "# text\n" + "".join(f"{i}\t{word}\t_\t{tag}\t_\t_\t_\t_\t_\n" for i, word, tag in words) + "\n"
    for part in ("train", "test"):
        (tmp_path / f"en_ewt-ud-{part}.conllu").write_text(rows)
    train, test = tagger.load(tmp_path)
    assert train == test == [[("dogs", "NOUN"), ("run", "VERB")]]
    train_arrays, _, pieces, tags = tagger.encode(train, [[("cats", "NOUN"), ("run", "ADV")]])
    assert (pieces, tags) == (6, 3)
    assert train_arrays["tags"][0, :3].tolist() == [1, 2, 0]
    for part, label in (("train", "cat"), ("train", "dog"), ("test", "dog")):
        (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).save(tmp_path / part / label / "0.jpg")
    folders = cnn.load(tmp_path)
    assert folders[0][0].shape == (2, 4, 4, 3)
    assert folders[0][1].tolist() == [0, 1]
    assert folders[1][1].tolist() == [1]
    with lzma.open(tmp_path / "cifar10-jpeg.tar.xz", "wb") as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for part in ("train", "test"):
            tar.add(tmp_path / part, part)
    archive = cnn.load(tmp_path)
    assert all(np.array_equal(np.sort(a[1]), np.sort(b[1])) for a, b in zip(archive, folders, strict=True))
    (tmp_path / "text.txt").write_text("some text")
    assert transformer.load(tmp_path / "text.txt") == "some text"
