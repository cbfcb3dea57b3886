"""From an equation of a program to the operation that a rule needs."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import lax

from msbp_jax.rules._contraction import Side
from msbp_jax.rules._convolution import Convolution
from msbp_jax.rules._dot_general import DotGeneral
from msbp_jax.rules._operation import Operation
from msbp_jax.rules._ragged_dot import RaggedDot

# The primitives that are contractions, by their names.
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})

_PLAIN_RAGGED_DOT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def operation_of(primitive: str, params: dict[str, Any], side: Side) -> Operation:
    """Return the operation of an equation.

    Args:
      primitive: Name of its primitive, one of `CONTRACTIONS`.
      params: Its parameters.
      side: Which operand is the weight.

    Raises:
      NotImplementedError: No rule takes it; the message says why.
    """
    if primitive == "dot_general":
        return _made(DotGeneral, {"side": side, **params})
    if side == "lhs":
        raise NotImplementedError(f"the parameter is the left operand of {primitive}")
    if primitive == "conv_general_dilated":
        return _made(Convolution, params)
    known = dict(params)
    dimension_numbers = known.pop("ragged_dot_dimension_numbers", None)
    if dimension_numbers != _PLAIN_RAGGED_DOT or known.pop("out_sharding", None) is not None:
        raise NotImplementedError("a ragged product of another form than lax.ragged_dot's")
    return _made(RaggedDot, known)


def _made(operation: Any, params: dict[str, Any]) -> Operation:
    """Return an operation of an equation's parameters: of one that another JAX added, nobody knows what it means."""
    fields = dataclasses.fields(operation)
    if unknown := sorted(set(params) - {field.name for field in fields}):
        raise NotImplementedError(f"its parameter {', '.join(unknown)} is not known to this version of msbp_jax")
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if missing := sorted(needed - set(params)):
        raise NotImplementedError(f"it lacks the parameter {', '.join(missing)} in this version of JAX")
    made: Operation = operation(**params)
    return made
