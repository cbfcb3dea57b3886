"""Axes of arrays as products of factors, which are the same one wherever a program ties axes together.

An axis of a flattened image, `height * width * channels`, has three factors; the channels are those of the convolution
in front of it. A factor that turns out to be a product itself is replaced by its parts wherever it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class Factor:
    """A part of an axis.

    Attributes:
      size: How many entries.
      reason: Why it cannot have fewer; empty where nothing is known.
      consumed: Whether it is contracted with a parameter somewhere.
    """

    def __init__(self, size: int, reason: str = "") -> None:
        self.size = size
        self.reason = reason
        self.consumed = False
        self._same: Factor | None = None
        self._parts: list[Factor] | None = None

    def root(self) -> Factor:
        """Return the factor that stands for all that are the same."""
        found = self
        while found._same is not None:
            found = found._same
        return found

    def parts(self) -> list[Factor]:
        """Return the factors that it consists of, the outer one first."""
        root = self.root()
        return [root] if root._parts is None else [part for inner in root._parts for part in inner.parts()]

    def split(self, outer: int) -> None:
        """Make it a product of two, of which the first has a size."""
        root = self.root()
        both = [Factor(outer, root.reason), Factor(root.size // outer, root.reason)]
        for part in both:
            part.consumed = root.consumed
        root._parts = both

    def unite(self, other: Factor) -> None:
        """Make it the same as another of its size."""
        mine, theirs = self.root(), other.root()
        if mine is not theirs:
            theirs._same = mine
            mine.reason = mine.reason or theirs.reason
            mine.consumed |= theirs.consumed


type Dim = list[Factor]


def fresh(size: int, reason: str = "") -> Dim:
    """Return an axis of which nothing is known."""
    return [Factor(size, reason)] if size != 1 else []


def flat(dims: Iterable[Dim]) -> Dim:
    """Return the factors of axes, one behind the other."""
    return [part for dim in dims for factor in dim for part in factor.parts()]


def size_of(dim: Dim) -> int:
    """Return the length of an axis."""
    return math.prod(factor.size for factor in flat([dim]))


def block(dims: Iterable[Dim], reason: str) -> None:
    """Say why axes cannot have fewer entries; the first reason stays."""
    for factor in flat(dims):
        factor.reason = factor.reason or reason


def unite(first: Dim, second: Dim) -> None:
    """Make two axes of one length the same, splitting factors where one has finer ones."""
    while True:
        left, right = flat([first]), flat([second])
        pair = next(((a, b) for a, b in zip(left, right, strict=False) if a is not b), None)
        if pair is None:
            return
        a, b = pair
        if a.size == b.size:
            a.unite(b)
        elif a.size % b.size == 0:
            a.split(b.size)
        elif b.size % a.size == 0:
            b.split(a.size)
        else:
            block([left, right], "its parts are cut in two ways that do not fit")
            return


def regrouped(dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """Return the axes of an array that was reshaped."""
    rest = flat(dims)
    found: list[Dim] = []
    for length in shape:
        axis: Dim = []
        left = length
        while left > 1 and rest:
            factor = rest[0]
            if left % factor.size == 0:
                axis.append(rest.pop(0))
                left //= factor.size
            elif factor.size % left == 0:
                factor.split(left)
                rest = flat([rest])
            else:
                break
        if left > 1:
            reason = "it is reshaped across its parts"
            block([axis, rest], reason)
            axis, rest = fresh(length, reason), rest[1:]
        found.append(axis)
    return found
