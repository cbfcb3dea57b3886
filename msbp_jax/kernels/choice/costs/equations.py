"""A program as one list of equations: calls inlined, views seen through, and what nobody reads left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from msbp_jax import _compat

# A value of the program; literals have none.
type Token = int


def names(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


# What hands its operands on, in another shape or order at most: XLA gives them another layout, and copies nothing.
_VIEWS = names(
    "reshape squeeze expand_dims transpose copy copy_p stop_gradient msbp_by_purpose sharding_constraint "
    "optimization_barrier pvary reduce_precision mesh_cast reshard"
)
# Bodies that are not run once where they stand.
LOOPS = names("scan while cond shard_map")
# Bodies that say how to combine two numbers, and what an array is sorted by.
_OF_NUMBERS = names(
    "reduce reduce_window scatter scatter-add scatter_add scatter_mul scatter_min scatter_max "
    "select_and_scatter select_and_scatter_add pallas_call"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Equation:
    """One equation.

    Attributes:
      name: Of its primitive.
      params: Of its primitive.
      inputs: What it reads; None for a literal.
      outputs: What it makes.
      avals: Shapes and dtypes of its operands.
      results: Shapes and dtypes of what it makes.
    """

    name: str
    params: dict[str, Any]
    inputs: tuple[Token | None, ...]
    outputs: tuple[Token, ...]
    avals: tuple[Any, ...]
    results: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """A program without calls.

    Attributes:
      arguments: What it is given.
      equations: In their order; all of them are needed.
      results: What it returns.
    """

    arguments: tuple[Token, ...]
    equations: tuple[Equation, ...]
    results: tuple[Token | None, ...]

    def split(self, fixed: int) -> tuple[Listing, Listing]:
        """Return what depends on the first arguments alone, as XLA moves it out of a loop, and the rest."""
        known: set[Token | None] = {None, *self.arguments[:fixed]}
        once: list[Equation] = []
        each: list[Equation] = []
        for equation in self.equations:
            alone = equation.inputs and known.issuperset(equation.inputs)
            (once if alone else each).append(equation)
            known.update(equation.outputs if alone else ())
        read = {token for equation in each for token in equation.inputs} | set(self.results)
        made = [token for equation in once for token in equation.outputs if token in read]
        return Listing(self.arguments, tuple(once), tuple(made)), Listing(self.arguments, tuple(each), self.results)


def listing(program: _compat.ClosedJaxpr, wanted: Sequence[bool] | None = None) -> Listing:
    """Return the equations that the results of a program need.

    Args:
      program: Traced.
      wanted: Which results are asked for; all by default.
    """
    walk = _Inlined()
    body = program.jaxpr
    arguments = [walk.new() for _ in body.invars]
    results = walk.body(body, arguments)
    asked = [r for r, yes in zip(results, wanted or [True] * len(results), strict=True) if yes]
    return Listing(tuple(arguments), tuple(_needed(walk.equations, asked)), tuple(asked))


def size_of(aval: Any) -> int:
    """Return the number of entries."""
    return math.prod(aval.shape)


def bytes_of(aval: Any) -> int:
    """Return the bytes of an array; of keys those of their bits."""
    return size_of(aval) * (8 if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended) else aval.dtype.itemsize)


class _Inlined:
    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self._count = 0

    def new(self) -> Token:
        self._count += 1
        return self._count

    def body(self, jaxpr: Any, arguments: Sequence[Token | None]) -> list[Token | None]:
        """List the equations of a body; return its results."""
        known: dict[Any, Token | None] = {constant: self.new() for constant in jaxpr.constvars}
        known.update(zip(jaxpr.invars, arguments, strict=True))
        read = lambda atom: None if isinstance(atom, _compat.Literal) else known[atom]
        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            known.update(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Token | None]) -> Sequence[Token | None]:
        """List an equation, or those of the body that it calls."""
        name = eqn.primitive.name
        if name in _VIEWS and len(eqn.outvars) <= len(inputs):
            return inputs[: len(eqn.outvars)]
        if name not in LOOPS | _OF_NUMBERS:
            bodies = [_compat.closed(body).jaxpr for body in _compat.jaxprs_in_params(eqn.params)]
            called = [body for body in bodies if len(body.invars) == len(inputs)]
            if called:
                return self.body(called[0], inputs)
        outputs = tuple(self.new() for _ in eqn.outvars)
        shapes = lambda atoms: tuple(atom.aval for atom in atoms)
        made = Equation(name, eqn.params, tuple(inputs), outputs, shapes(eqn.invars), shapes(eqn.outvars))
        self.equations.append(made)
        return outputs


def _needed(equations: list[Equation], results: Iterable[Token | None]) -> list[Equation]:
    """Return the equations that the results depend on."""
    live = set(results)
    kept = []
    for equation in reversed(equations):
        if live & set(equation.outputs):
            kept.append(equation)
            live.update(equation.inputs)
    return kept[::-1]
