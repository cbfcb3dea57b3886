"""What adding a number to a feature of a layer's output, in all rows alike, does to what is computed from it.

A norm over the batch takes such a number out again: x - mean(x) does not change, nor does mean(x²) - mean(x)². So the
gradient of the feature sums to 0 over the rows. An array is marked, for each layer, by how it changes:

    VALUE    by that number                       SQUARE   as its square does
    SUM      a sum over rows, by a multiple       SQUARES  a sum of squares
    SQUARED  the square of a SUM                  OTHER    in any other way

and has no mark of a layer that does not change it. With a SUM and what is made from it goes its factor, by which it is
more than a mean: the number of its rows at first, and 1 when it has been divided by that. Only a mean takes it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msbp_jax import _compat

type Mark = tuple[str, float]  # how, and by which factor
type Marks = frozenset[tuple[str, Mark]]  # of layers, by their names

VALUE, SUM, SQUARE, SQUARES, SQUARED, OTHER = (
    (how, 1.0) for how in ("value", "sum", "square", "squares", "squared", "other")
)

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
_SQUARED = {"value": "square", "sum": "squared"}
_SUMMED = {"value": "sum", "square": "squares"}
_CANCEL = {("value", "sum"), ("sum", "value"), ("squares", "squared"), ("squared", "squares")}


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
        return _squared(inputs[0])
    if name == "mul" and eqn.invars[0] is eqn.invars[1]:
        return _squared(inputs[0])
    if name == "reduce_sum" and sums_rows:
        left = math.prod(_compat.shape_of(eqn.outvars[0]).shape)
        rows = math.prod(_compat.shape_of(eqn.invars[0]).shape) / max(1, left)
        return frozenset(
            (site, (_SUMMED[how], rows * factor) if how in _SUMMED and features[site] == left else OTHER)
            for site, (how, factor) in inputs[0]
        )
    if name == "mul" or name == "div":
        for marks, other in ((inputs[0], eqn.invars[1]), (inputs[1], eqn.invars[0]))[: 2 if name == "mul" else 1]:
            if isinstance(other, _compat.Literal):
                return _scaled(marks, float(other.val), divided=name == "div")
    if name in ("add", "sub", "add_any"):
        return _added(*inputs, subtracted=name == "sub")
    return frozenset((site, OTHER) for marks in inputs for site, _ in marks)


def _squared(marks: Marks) -> Marks:
    return frozenset(
        (site, (_SQUARED[how], factor * factor) if how in _SQUARED else OTHER) for site, (how, factor) in marks
    )


def _scaled(marks: Marks, number: float, *, divided: bool) -> Marks:
    """Return the marks of a product with a number, such as that which makes a mean of a sum."""
    if number == 0 or not math.isfinite(number):
        return frozenset((site, OTHER) for site, _ in marks)
    by = 1 / number if divided else number
    return frozenset(
        (site, (how, factor * by) if how in ("sum", "squares") else OTHER) for site, (how, factor) in marks
    )


def _added(left: Marks, right: Marks, *, subtracted: bool) -> Marks:
    first, second = dict(left), dict(right)
    found = set()
    for site in first.keys() | second.keys():
        one, other = first.get(site), second.get(site)
        if one is not None and other is not None and subtracted and _cancel(one, other):
            continue
        stays = (one == VALUE and other is None) or (one is None and other == VALUE and not subtracted)
        found.add((site, VALUE if stays else OTHER))
    return frozenset(found)


def _cancel(one: Mark, other: Mark) -> bool:
    means = all(math.isclose(factor, 1, rel_tol=1e-5) for _, factor in (one, other))  # as float32 has 1 / rows
    return means and (one[0], other[0]) in _CANCEL
