"""Data for the demo: scikit-learn's bundled digits, or MNIST from a folder of IDX files."""

from __future__ import annotations

import gzip
import pathlib
import struct
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MNIST_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


class Dataset(NamedTuple):
    """Images as rows of floats in [0, 1], and their classes.

    Attributes:
      name: What it is.
      train_x: `[examples, pixels]`, float32.
      train_y: `[examples]`, int32.
      test_x: `[examples, pixels]`, float32.
      test_y: `[examples]`, int32.
    """

    name: str
    train_x: Float[np.ndarray, "n pixels"]
    train_y: Int[np.ndarray, " n"]
    test_x: Float[np.ndarray, "t pixels"]
    test_y: Int[np.ndarray, " t"]


def load(folder: pathlib.Path | None) -> Dataset:
    """Return MNIST from `folder`, or the bundled digits if it is None.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is truncated, or not what its name says.
    """
    return load_digits() if folder is None else load_mnist(folder)


def load_digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: every fifth one is for testing."""
    from sklearn.datasets import load_digits as bundled  # an optional dependency, for the demo only

    digits = bundled()
    x, y = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    test = np.arange(len(y)) % 5 == 4
    return Dataset("digits (scikit-learn)", x[~test], y[~test], x[test], y[test])


def load_mnist(folder: pathlib.Path) -> Dataset:
    """Return MNIST from its four IDX files, gzipped (`.gz`) or not.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is truncated, or not what its name says.
    """
    arrays = {part: read_idx(_find(folder, name)) for part, name in MNIST_FILES.items()}
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"The {split} files in {folder} do not fit together: expected images [n, height, width] and labels "
                f"[n], got shapes {images.shape} and {labels.shape}. Fetch both again."
            )

    def pixels(part: str) -> np.ndarray:
        images = arrays[part]
        return images.reshape(len(images), -1).astype(np.float32) / 255

    def classes(part: str) -> np.ndarray:
        return arrays[part].astype(np.int32)

    return Dataset(
        "MNIST", pixels("train_images"), classes("train_labels"), pixels("test_images"), classes("test_labels")
    )


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Return the array of bytes in an IDX file.

    Raises:
      ValueError: The file is truncated, damaged, or not an IDX file of unsigned bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): it is truncated or damaged. Fetch it again.") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it starts with {raw[:4]!r}. Fetch it again.")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    body = raw[4 + 4 * raw[3] :]
    if len(body) != np.prod(shape):
        raise ValueError(
            f"{path} is truncated: expected {np.prod(shape)} bytes of data for shape {shape}, got {len(body)}. "
            "Fetch it again."
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} has neither {name}.gz nor {name}. Expected the four IDX files of MNIST there; without --data the "
        "demo uses scikit-learn's bundled digits."
    )
