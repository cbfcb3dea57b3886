"""The demo: its data, its arguments, and one small real run."""

import gzip
import json
import struct

import jax
import numpy as np
import pytest

from msbp_jax.demo import cli, data


def idx(array):
    array = np.asarray(array, np.uint8)
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (6, 4, 5)),
        "train_labels": np.arange(6) % 10,
        "test_images": rng.integers(0, 256, (3, 4, 5)),
        "test_labels": np.arange(3),
    }
    for part, name in data.MNIST_FILES.items():
        raw = idx(arrays[part])
        packed = part.startswith("train")
        (tmp_path / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(raw) if packed else raw)
    return tmp_path, arrays


def test_idx_files_gzipped_and_plain(mnist):
    folder, arrays = mnist
    loaded = data.load(folder)
    np.testing.assert_allclose(loaded.train_x * 255, arrays["train_images"].reshape(6, 20), rtol=1e-6)
    np.testing.assert_array_equal(loaded.test_y, arrays["test_labels"])
    assert (loaded.train_x.dtype, loaded.train_y.dtype, loaded.name) == (np.float32, np.int32, "MNIST")


def test_digits_are_split_without_overlap():
    digits = data.load(None)
    assert (len(digits.train_y), len(digits.test_y), digits.train_x.shape[1]) == (1438, 359, 64)
    assert digits.train_x.max() == 1.0
    assert np.bincount(digits.test_y).min() > 20


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte").unlink(), FileNotFoundError, "has neither .*gz nor .*without --data"),
        (lambda f: cut(f / "train-images-idx3-ubyte.gz", 20), ValueError, "cannot be unpacked .* truncated or damaged"),
        (lambda f: cut(f / "t10k-images-idx3-ubyte", 30), ValueError, r"is truncated: expected 60 bytes .* got 14"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b"GIF8"), ValueError, "no IDX file of unsigned bytes"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b""), ValueError, "no IDX file of unsigned bytes"),
        (
            lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(idx([1])),
            ValueError,
            "test files .* do not fit together",
        ),
    ],
)
def test_bad_files(mnist, spoil, error, message):
    spoil(mnist[0])
    with pytest.raises(error, match=message):
        data.load(mnist[0])


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "3", "--density", "0.1"], "--density and --k exclude each other, got 0.1 and 3"),
        (["--k", "0"], "k must be at least 1"),
        (["--k", "x"], "invalid int value: 'x'"),
        (["--density", "0"], "density must lie in (0, 1]"),
        (["--density", "1.01"], "density must lie in (0, 1]"),
        (["--rows-per-group", "0"], "rows_per_group must be at least 1"),
        (["--rows-per-group", "few"], "--rows-per-group must be a number of rows or None, got 'few'"),
        (["--efficiency", "0"], "efficiency must lie in (0, 1]"),
        (["--decay", "1.2"], "decay must lie in [0, 1]"),
        (["--width", "0"], "--width must be at least 1, got 0"),
        (["--depth", "-1"], "--depth must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch", "5000"], "--batch must be at most the 1438 training examples there are, got 5000"),
        (["--optimizer", "magic"], "invalid choice: 'magic'"),
        (["--plot", "no/such/folder/x.png"], "--plot must name a file in a folder that exists"),
        (["--json", ""], "--json must name a file"),
        (["--data", "no/such/folder"], "no/such/folder has neither"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--dens", "0.1"], "unrecognized arguments: --dens"),
    ],
)
def test_bad_arguments_end_before_training(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--no-plot"] if "--plot" not in arguments else arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["--no-plot"])
    assert "the demo needs tqdm, sklearn: pip install 'msbp-jax[examples]'" in capsys.readouterr().err


def test_help_teaches_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for action in cli.parser()._actions:
        assert action.option_strings[-1] in text
        assert action.help
    assert "what is dropped is remembered" in text


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys, monkeypatch):
    from msbp_jax.demo import timing

    monkeypatch.setattr(timing, "ROUNDS", 3)
    files = {"--plot": tmp_path / "a.png", "--json": tmp_path / "a.json"}
    words = [
        "--width",
        "96",
        "--depth",
        "2",
        "--epochs",
        "6",
        "--k",
        "12",
        "--rows-per-group",
        "None",
        "--optimizer",
        "sgd",
    ]
    words += [str(word) for pair in files.items() for word in pair]
    with jax.numpy_rank_promotion("allow"):  # Flax adds biases by rank promotion
        assert cli.main(words) == 0
        first = json.loads(files["--json"].read_text())
        assert cli.main([*words, "--no-plot"]) == 0
    again = json.loads(files["--json"].read_text())
    printed = capsys.readouterr().out
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    assert list(first) == ["dense", "rows", "top-k", "MSBP"]
    assert first["rows"]["density"][-1] < first["rows"]["density"][0] <= 1
    assert first["rows"]["kept"] == pytest.approx(np.mean(first["rows"]["density"]))
    for name, result in first.items():
        assert result["loss"] == again[name]["loss"]  # the same seed, the same numbers
        assert result["loss"][-1] < result["loss"][0]
        assert result["accuracy"][-1] > 0.5
        assert name in printed
    assert first["dense"]["kept"] == 1.0
    assert first["MSBP"]["kept"] == pytest.approx((12 / 96 * (64 * 96 + 96 * 96) + 960) / (64 * 96 + 96 * 96 + 960))
    assert "Dense_1/kernel" in printed
    assert "k 12, one choice for the batch" in printed


def test_the_time_to_a_target():
    from msbp_jax.demo.run import Result

    result = Result(seconds=[1.0, 2.0, 3.0], loss=[0.5, 0.3, 0.2], accuracy=[0.5, 0.8, 0.7], density=[1.0] * 3)
    assert (result.time_to_loss(0.3), result.time_to_loss(0.1)) == (2.0, None)
    assert (result.time_to_accuracy(0.8), result.time_to_accuracy(0.9)) == (2.0, None)
