"""Text to predict, character by character: Python's own standard library."""

from __future__ import annotations

import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np


def load() -> np.ndarray:
    """Return two million characters, as numbers."""
    sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = "\n".join(source.read_text(errors="ignore") for source in sources)[:2_000_000]
    characters = {character: i for i, character in enumerate(sorted(set(found)))}
    return np.array([characters[character] for character in found], np.int32)


def windows(numbers: np.ndarray, batch: int, length: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of windows and, for each character, the one behind it.

    Args:
      numbers: The text.
      batch: Windows at a time.
      length: Characters of a window.
      seed: Of where they begin.
    """
    draw = np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(numbers) - length - 1, batch)
        found = numbers[starts[:, None] + np.arange(length + 1)]
        yield found[:, :-1], found[:, 1:]
