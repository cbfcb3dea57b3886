"""Capacities: the few numbers of units that programs are compiled for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Final

_MARGIN: Final = 3.0  # standard deviations above the mean that a capacity leaves room for


def rungs(size: int, ratio: float) -> list[int]:
    """Return the capacities of a group, from all of its units down, each so many times smaller than the last.

    Those of 64 and more are multiples of 16, which tiles of products have, and those of 16 and more of 8.

    Args:
      size: Units of the group.
      ratio: Above 1.
    """

    def below() -> Iterator[int]:
        for at in itertools.count(1):
            wanted = size / ratio**at
            multiple = 16 if wanted >= 64 else 8 if wanted >= 16 else 1
            yield math.ceil(wanted / multiple) * multiple
            if wanted <= 1:
                return

    found = [size]
    for rung in below():
        if rung < found[-1]:
            found.append(rung)
    return found


def capacity(size: int, ratio: float, mean: float, variance: float, least: int, previous: int | None = None) -> int:
    """Return the smallest rung that holds almost every sample, and this one; or the one before, if it is next to it.

    Args:
      size: Units of the group.
      ratio: Between rungs.
      mean: Of the number of units in a sample.
      variance: Of it.
      least: How many there are in this sample.
      previous: The capacity before, so that one that wavers between two rungs stays at the upper one.
    """
    wanted = max(least, min(size, math.ceil(mean + _MARGIN * math.sqrt(variance))), 1)
    known = rungs(size, ratio)
    found = min(rung for rung in known if rung >= wanted)
    if previous in known and 0 <= known.index(found) - known.index(previous) <= 1:
        return previous
    return found
