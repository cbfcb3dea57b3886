"""What adding a number to a feature of a layer's output, in all rows alike, does to what is computed from it.

A norm over the batch takes such a number out again: x - mean(x) does not change, nor does mean(x²) - mean(x)². So the
gradient of the feature sums to 0 over the rows. An array is marked, for each layer, by how it changes:

    VALUE    by that number                       SQUARE   as its square does
    SUM      a sum over rows, by a multiple       SQUARES  a sum of squares
    SQUARED  the square of a SUM                  OTHER    in any other way

and has no mark of a layer that does not change it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msbp_jax import _compat

type Marks = frozenset[tuple[str, str]]  # of layers, by their names

VALUE, SUM, SQUARE, SQUARES, SQUARED, OTHER = "value", "sum", "square", "squares", "squared", "other"

_PASS = frozenset(
    {
        "convert_element_type",
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "squeeze",
        "copy",
        "copy_p",
        "reduce_precision",
    }
)
_SQUARED = {VALUE: SQUARE, SUM: SQUARED}
_SUMMED = {VALUE: SUM, SQUARE: SQUARES}
_CANCEL = {(VALUE, SUM), (SUM, VALUE), (SQUARES, SQUARED), (SQUARED, SQUARES)}


def joined_marks(left: Marks, right: Marks) -> Marks:
    """Return the marks of what is one array or another."""
    first, second = dict(left), dict(right)
    names = first.keys() | second.keys()
    return frozenset((name, first[name] if first.get(name) == second.get(name) else OTHER) for name in names)


def marked(eqn: _compat.JaxprEqn, inputs: Sequence[Marks], *, sums_rows: bool, features: Mapping[str, int]) -> Marks:
    """Return the marks of the result of an equation without a body.

    Args:
      eqn: The equation.
      inputs: Marks of its operands.
      sums_rows: Whether it sums over the rows.
      features: How many each layer has: a sum that leaves fewer has added them up, too.
    """
    name = eqn.primitive.name
    if name in _PASS:
        return inputs[0]
    if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
        return _each(inputs[0], _SQUARED)
    if name == "mul" and eqn.invars[0] is eqn.invars[1]:
        return _each(inputs[0], _SQUARED)
    if name == "reduce_sum" and sums_rows:
        left = math.prod(_compat.shape_of(eqn.outvars[0]).shape)
        table = lambda site: _SUMMED if features[site] == left else {}
        return frozenset((site, table(site).get(mark, OTHER)) for site, mark in inputs[0])
    if name in ("mul", "div") and isinstance(eqn.invars[1], _compat.Literal):  # the number of a mean's rows
        return frozenset((site, mark if mark in (SUM, SQUARES) else OTHER) for site, mark in inputs[0])
    if name in ("add", "sub", "add_any"):
        return _added(*inputs, cancels=name == "sub")
    return frozenset((site, OTHER) for marks in inputs for site, _ in marks)


def _each(marks: Marks, table: dict[str, str]) -> Marks:
    return frozenset((site, table.get(mark, OTHER)) for site, mark in marks)


def _added(left: Marks, right: Marks, *, cancels: bool) -> Marks:
    first, second = dict(left), dict(right)
    found = set()
    for site in first.keys() | second.keys():
        pair = first.get(site), second.get(site)
        if cancels and pair in _CANCEL:
            continue
        found.add((site, VALUE if pair in ((VALUE, None), (None, VALUE)) else OTHER))
    return frozenset(found)
