"""Which contractions a step differentiates, and with respect to which of their operands.

The gradient of an operand is needed where it was made from a trained parameter: not where that is an integer (a
quantized base), behind `stop_gradient`, or data. And there is none at all where no result of the program that has a
gradient was made from the contraction. One walk carries both, for every array: whether it depends on a trained
parameter, and through which contractions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.rules import CONTRACTIONS
from msbp_jax.transform._discover import Place
from msbp_jax.transform._program import Program


@dataclasses.dataclass(frozen=True, slots=True)
class _Flow:
    """What a gradient of an array flows back to.

    Attributes:
      trains: Whether a trained parameter is there.
      through: The contractions on the way to one.
    """

    trains: bool = False
    through: frozenset[Place] = frozenset()

    def __or__(self, other: _Flow) -> _Flow:
        return _Flow(self.trains or other.trains, self.through | other.through)


_NONE = _Flow()


def needed_gradients(program: Program) -> dict[Place, tuple[bool, bool]]:
    """Return, for each contraction that a step differentiates, whether left and right operand need their gradient.

    Args:
      program: The program; its arguments may be shapes.
    """
    count = len(program.parameters)
    arguments = [_Flow(number < count and _has_gradient(var)) for number, var in enumerate(program.jaxpr.jaxpr.invars)]
    walk = _Walk()
    reached = _union(walk.jaxpr(program.jaxpr, arguments, ())).through
    return {place: operands for place, operands in walk.operands.items() if place in reached}


def _has_gradient(atom: _compat.Var | _compat.Literal) -> bool:
    return jnp.issubdtype(_compat.shape_of(atom).dtype, jnp.inexact)


def _union(flows: Iterable[_Flow]) -> _Flow:
    return functools.reduce(_Flow.__or__, flows, _NONE)


class _Walk:
    def __init__(self) -> None:
        self.operands: dict[Place, tuple[bool, bool]] = {}

    def jaxpr(self, jaxpr: _compat.ClosedJaxpr, arguments: Sequence[_Flow], place: Place) -> list[_Flow]:
        known: dict[_compat.Var, _Flow] = dict.fromkeys(jaxpr.jaxpr.constvars, _NONE)
        known.update(zip(jaxpr.jaxpr.invars, arguments, strict=True))
        read = lambda atom: _NONE if isinstance(atom, _compat.Literal) else known[atom]
        for number, eqn in enumerate(jaxpr.jaxpr.eqns):
            results = self.equation(eqn, [read(atom) for atom in eqn.invars], (*place, number))
            for var, result in zip(eqn.outvars, results, strict=True):
                known[var] = result if result.trains and _has_gradient(var) else _NONE
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def equation(self, eqn: _compat.JaxprEqn, inputs: list[_Flow], place: Place) -> list[_Flow]:
        if eqn.primitive.name in CONTRACTIONS:
            old = self.operands.get(place, (False, False))
            self.operands[place] = old[0] or inputs[0].trains, old[1] or inputs[1].trains
            return [_union([*inputs, _Flow(through=frozenset({place}))])]
        if eqn.primitive.name == "stop_gradient":
            return [_NONE]
        match eqn.primitive:
            case _compat.jit_p | _compat.remat_p | _compat.closed_call_p:
                key = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
                return self.jaxpr(_compat.closed(eqn.params[key]), inputs, place)
            case _compat.scan_p:
                return self._scan(eqn, inputs, place)
            case _compat.cond_p:
                branches = [
                    self.jaxpr(_compat.closed(branch), inputs[1:], (*place, number))
                    for number, branch in enumerate(eqn.params["branches"])
                ]
                return [_union(results) for results in zip(*branches, strict=True)]
            case _ if eqn.primitive.name == "shard_map":
                return self.jaxpr(_compat.closed(eqn.params["jaxpr"]), inputs, place)
        return [_union([*inputs, *self._within(eqn, inputs, place)])] * len(eqn.outvars)

    def _within(self, eqn: _compat.JaxprEqn, inputs: list[_Flow], place: Place) -> list[_Flow]:
        """Walk the bodies of an equation of another kind: whatever it does, its results come from its operands."""
        found = []
        for number, body in enumerate(_compat.jaxprs_in_params(eqn.params)):
            alike = len(body.invars) == len(inputs)
            found += self.jaxpr(
                _compat.closed(body), inputs if alike else [_union(inputs)] * len(body.invars), (*place, number)
            )
        return found

    def _scan(self, eqn: _compat.JaxprEqn, inputs: list[_Flow], place: Place) -> list[_Flow]:
        consts, carries = _compat.scan_arity(eqn.params)
        body, carry = _compat.closed(eqn.params["jaxpr"]), inputs[consts : consts + carries]
        while True:
            results = self.jaxpr(body, [*inputs[:consts], *carry, *inputs[consts + carries :]], place)
            grown = [old | new for old, new in zip(carry, results[:carries], strict=True)]
            if grown == carry:
                return [*carry, *results[carries:]]
            carry = grown
