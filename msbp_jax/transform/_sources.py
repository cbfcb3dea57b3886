"""Data flow: what every variable of a program was made from, as far as finding parameters needs it.

A variable that depends on parameters and on nothing the data touches is a weight, however it was reshaped, cast, tied,
scaled or put together from several leaves. Everything else that any example argument reaches is data; but a weight
times a number is a weight, be the number written in the program or an argument.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

# Of a scan: its place in the program and "". Of an axis of a shard_map's mesh: the place and the axis's name.
type LoopId = tuple[tuple[int, ...], str]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a variable comes from.

    Attributes:
      parameters: Numbers of the parameter leaves it depends on.
      data: Whether it depends on an argument that is not a parameter.
      varies: The loops over whose iterations, or the mesh axes over whose devices, it is not constant.
      moves: Whether it may depend on something that is differentiated.
    """

    parameters: frozenset[int] = frozenset()
    data: bool = False
    varies: frozenset[LoopId] = frozenset()
    moves: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether it is made from parameters alone."""
        return bool(self.parameters) and not self.data

    def __or__(self, other: Source) -> Source:
        """Return the source of something made from both."""
        if other is self:
            return self
        return Source(
            self.parameters | other.parameters,
            self.data or other.data,
            self.varies | other.varies,
            self.moves or other.moves,
        )

    def within(self, *loops: LoopId) -> Source:
        """Return the source of what changes from one iteration of `loops` to the next."""
        return dataclasses.replace(self, varies=self.varies | set(loops))

    def outside(self, *loops: LoopId) -> Source:
        """Return the source of what leaves `loops`, or is made the same in all their iterations."""
        return dataclasses.replace(self, varies=self.varies - set(loops))

    def stopped(self) -> Source:
        """Return the source of something from which no gradient flows back."""
        return dataclasses.replace(self, moves=False)


CONSTANT = Source()
DATA = Source(data=True, moves=True)


def union(sources: Iterable[Source]) -> Source:
    """Return the source of something made from all of them."""
    return functools.reduce(Source.__or__, sources, CONSTANT)
