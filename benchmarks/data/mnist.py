"""MNIST from its four IDX files, or scikit-learn's digits: images as rows of floats from 0 to 1."""

from __future__ import annotations

import gzip
import pathlib
import struct

import numpy as np

from benchmarks.data.images import Images


def load(folder: pathlib.Path | None) -> Images:
    """Return MNIST, or the digits.

    Args:
      folder: Where the four files lie, gzipped or not; None for scikit-learn's 1,797 digits of 8 x 8 pixels, of which
        every fifth one is for testing.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is not what its name says.
    """
    if folder is None:
        return _digits()
    images = [read_idx(_find(folder, f"{part}-images-idx3-ubyte")) for part in ("train", "t10k")]
    labels = [read_idx(_find(folder, f"{part}-labels-idx1-ubyte")).astype(np.int32) for part in ("train", "t10k")]
    train, test = (pixels.reshape(len(pixels), -1).astype(np.float32) / 255 for pixels in images)
    return Images("MNIST", train, labels[0], test, labels[1])


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Return the array of bytes in an IDX file.

    Args:
      path: The file; unpacked if its name ends in `.gz`.

    Raises:
      ValueError: It is no IDX file of bytes, or not as long as it says.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {raw[:4]!r}.")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape))
    if body.size != np.prod(shape):
        raise ValueError(f"{path} is truncated: {body.size} bytes of data for the shape {shape}.")
    return body.reshape(shape)


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name}.gz nor {name}.")


def _digits() -> Images:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    test = np.arange(len(y)) % 5 == 4
    return Images("digits", x[~test], y[~test], x[test], y[test])
