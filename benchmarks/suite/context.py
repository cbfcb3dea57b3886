"""What a part of the suite is told, and sizes that several parts share."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from benchmarks.helpers.peers import Torch
from benchmarks.helpers.records import Row


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """How a part is to be measured.

    Attributes:
      rounds: Calls of each candidate that count.
      torch: PyTorch, or the reason why there is none.
      data: Folder with MNIST, to record gradients from; None for scikit-learn's digits.
      small: Minute sizes, to see that it runs.
      keeps: Whether this process keeps the memory that it frees.
    """

    rounds: int
    torch: Torch
    data: pathlib.Path | None = None
    small: bool = False
    keeps: bool = False


class Grid(NamedTuple):
    """Layers that are measured.

    Attributes:
      shapes: Rows, inputs and outputs of each.
      densities: Shares of the outputs that are kept.
      groups: Rows that share a choice, by name; None for all.
    """

    shapes: tuple[tuple[int, int, int], ...]
    densities: tuple[float, ...]
    groups: Mapping[str, int | None]


LAYERS = Grid(
    shapes=((128, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096)),
    densities=(0.01, 0.04, 0.1, 0.25),
    groups={"1": 1, "32": 32, "128": 128, "all": None},
)
SMALL = Grid(shapes=((16, 24, 80),), densities=(0.1, 0.5), groups={"1": 1, "all": None})


def layers(context: Context) -> Grid:
    """Return the layers of most parts."""
    return SMALL if context.small else LAYERS


class Part(NamedTuple):
    """A part of the suite.

    Attributes:
      about: What it measures, in a line.
      rounds: Calls of each candidate that count, if nothing else is said.
      measure: Gives the rows.
      records: Whether gradients recorded from data are among what is measured.
    """

    about: str
    rounds: int
    measure: Callable[[Context], Iterator[Row]]
    records: bool = False
