"""What benchmarks and studies read: the files as they are handed out, and what stands in without them."""

import gzip
import itertools
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import cifar, mnist, tagging, text


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_mnist(tmp_path):
    pixels = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    classes = np.array([3, 1, 4, 1, 5], np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(classes))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels[:2]))
    with pytest.raises(FileNotFoundError, match=r"has neither t10k-labels-idx1-ubyte\.gz nor"):
        mnist.load(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(classes[:2]))
    data = mnist.load(tmp_path)
    np.testing.assert_allclose(data.train_x, pixels.reshape(5, 4) / np.float32(255))
    assert (data.name, data.train_x.dtype, data.test_x.shape) == ("MNIST", np.float32, (2, 4))
    assert data.train_y.tolist() == classes.tolist()


def test_a_damaged_file_is_no_data(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(idx(np.zeros((3, 2), np.uint8))[:-1])
    with pytest.raises(ValueError, match=r"is truncated: 5 bytes of data for the shape \(3, 2\)"):
        mnist.read_idx(file)
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="is no IDX file of bytes"):
        mnist.read_idx(file)


def test_digits():
    data = mnist.load(None)
    assert (data.train_x.shape, data.test_x.shape) == ((1438, 64), (359, 64))
    assert 0 == data.train_x.min() < data.train_x.max() == 1


def test_cifar_from_folders_and_from_the_archive(tmp_path):
    for part, name, shade in (("train", "cat", 0), ("train", "ship", 255), ("test", "ship", 255)):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(folder / "1.jpg")
    data = cifar.load(tmp_path)
    assert (data.train_x.shape, data.train_y.tolist(), data.test_y.tolist()) == ((2, 32, 32, 3), [0, 1], [1])
    assert (data.train_x[0].max(), data.train_x[1].min()) == (0, 1)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / cifar.ARCHIVE, "w:xz") as archive:
        for part in ("train", "test"):
            archive.add(tmp_path / part, f"cifar10/{part}")
    again = cifar.load(packed)
    assert sorted(again.train_y.tolist()) == [0, 1]
    np.testing.assert_array_equal(again.test_x, data.test_x)
    with pytest.raises(FileNotFoundError, match="has neither cifar10-jpeg"):
        cifar.load(tmp_path / "train")


CONLLU = """# text = It rains.
1\tIt\tit\tPRON\tPRP\t_\t2\tnsubj\t_\t_
2-3\trains.\t_\t_\t_\t_\t_\t_\t_\t_
2\trains\train\tVERB\tVBZ\t_\t0\troot\t_\t_
3\t.\t.\tPUNCT\t.\t_\t2\tpunct\t_\t_

1\tIt\tit\tPRON\tPRP\t_\t0\troot\t_\t_

"""


def test_tagging(tmp_path):
    (tmp_path / "en_ewt-ud-train.conllu").write_text(CONLLU)
    with pytest.raises(FileNotFoundError, match=r"has no en_ewt-ud-test\.conllu"):
        tagging.load(tmp_path, 2)
    with gzip.open(tmp_path / "en_ewt-ud-test.conllu.gz", "wt") as file:
        file.write(CONLLU.replace("rains", "pours"))
    data = tagging.load(tmp_path, 2)
    assert data.train["tags"].tolist() == [[1, 3], [1, 0]]  # PRON, PUNCT, VERB
    assert data.tags == 4
    assert data.test["words"][0, 1] == 1
    assert data.test["words"][0, 0] == data.train["words"][0, 0] > 1
    assert data.vocabulary == 2 + len({"it", "-it", "rains", "-ins", ".", "-."})


def test_made_up_sentences_follow_a_rule():
    data = tagging.load(None, 12)
    assert data.train["words"].shape == (2000, 12)
    rule = {}
    for sentence in tagging.made_up(200, 3):
        for (before, _), (word, tag) in itertools.pairwise(sentence):
            assert rule.setdefault((before, word), tag) == tag
    assert len(set(rule.values())) == 5


def test_windows_of_text():
    numbers = text.load()
    assert len(numbers) == 2_000_000
    x, y = next(text.windows(numbers, 3, 5, 0))
    assert x.shape == y.shape == (3, 5)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def test_moved_images():
    x = np.random.default_rng(0).random((8, 32, 32, 3), np.float32) + 1
    found = cifar.moved(x, np.random.default_rng(1))
    flat = cifar.moved(x.reshape(8, -1), np.random.default_rng(1))
    np.testing.assert_array_equal(flat, found.reshape(8, -1))
    for image, was in zip(found, x, strict=True):
        assert np.isin(was[8:24, 8:24], image).all()  # the middle is there wherever an image went
        assert (image == 0).mean() < 0.25
