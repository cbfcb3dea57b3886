"""CIFAR-10 from JPEGs, `train/CLASS/*.jpg` and `test/CLASS/*.jpg`, in a folder or in one archive in it."""

from __future__ import annotations

import pathlib
import tarfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from benchmarks.data import mnist
from benchmarks.data.images import Images

ARCHIVE = "cifar10-jpeg.tar.xz"


def centred(folder: pathlib.Path | None) -> Images:
    """Return the images as floats around 0; without a folder scikit-learn's digits, `[examples, 8, 8, 1]`, as they are.

    Args:
      folder: As in `load`.
    """
    if folder is not None:
        images = load(folder)
        return images._replace(train_x=images.train_x - 0.5, test_x=images.test_x - 0.5)
    digits = mnist.load(None)
    square = lambda x: x.reshape(-1, 8, 8, 1)
    return digits._replace(train_x=square(digits.train_x), test_x=square(digits.test_x))


def load(folder: pathlib.Path) -> Images:
    """Return the images, `[examples, height, width, 3]`, as floats from 0 to 1.

    Args:
      folder: Where the archive lies, or the folders `train` and `test`.

    Raises:
      FileNotFoundError: There is no image for training or none for testing.
    """
    from PIL import Image

    pixels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    for part, name, file in _files(folder):
        pixels[part].append(np.asarray(Image.open(file), np.uint8))
        names[part].append(name)
    if not names["train"] or not names["test"]:
        raise FileNotFoundError(f"{folder} has neither {ARCHIVE} nor train/CLASS/*.jpg and test/CLASS/*.jpg.")
    classes = sorted(set(names["train"]))
    x = {part: np.stack(found).astype(np.float32) / 255 for part, found in pixels.items()}
    y = {part: np.array([classes.index(name) for name in found], np.int32) for part, found in names.items()}
    return Images("CIFAR-10", x["train"], y["train"], x["test"], y["test"])


def moved(x: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return images of 32 x 32 x 3 shifted by up to four pixels, half of them mirrored.

    Args:
      x: `[examples, 32, 32, 3]`, or flat, `[examples, 3072]`; what comes in from outside is 0.
      draw: Where to, of each.
    """
    padded = np.pad(x.reshape(-1, 32, 32, 3), ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty((len(x), 32, 32, 3), x.dtype)
    which, mirrored = draw.integers(0, 81, len(x)), draw.random(len(x)) < 0.5
    for at in range(81):
        down, right = divmod(at, 9)
        for flipped in (False, True):
            among = (which == at) & (mirrored == flipped)
            out[among] = padded[among, down : down + 32, right : right + 32][:, :, :: -1 if flipped else 1]
    return out.reshape(x.shape)


def _files(folder: pathlib.Path) -> Iterator[tuple[str, str, IO[bytes] | pathlib.Path]]:
    """Yield (part, class, file)."""
    if (folder / ARCHIVE).is_file():
        with tarfile.open(folder / ARCHIVE) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    part, name = member.name.split("/")[-3:-1]
                    yield part, name, file
        return
    for part in ("train", "test"):
        for path in sorted((folder / part).glob("*/*.jpg")):
            yield part, path.parent.name, path
