"""Where an equation leaves the axis of the rows: a table over primitives, for `_mixes`.

What the table does not know keeps the axis where the result has the operand's shape, and loses it elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msbp_jax import _compat

NO_AXIS, LOST = -1, -2  # an array without rows; one whose rows are somewhere


def joined(axes: Iterable[int]) -> int:
    """Return the axis of what is made from several arrays of one shape."""
    found = set(axes) - {NO_AXIS}
    return found.pop() if len(found) == 1 else LOST if found else NO_AXIS


def summed_axes(eqn: _compat.JaxprEqn) -> list[tuple[int, ...]]:
    """Return, for each operand of a sum, the axes that it is summed over; nothing of another equation."""
    match eqn.primitive.name:
        case "reduce_sum":
            return [tuple(eqn.params["axes"])]
        case "dot_general":
            return [tuple(axes) for axes in eqn.params["dimension_numbers"][0]]
    return []


def reduces(eqn: _compat.JaxprEqn, axis: int) -> bool:
    """Whether an equation takes one number of each column along an axis, such as the largest, and adds nothing up."""
    return eqn.primitive.name in _REDUCED and axis in eqn.params["axes"]


def moved(eqn: _compat.JaxprEqn, number: int, axes: Sequence[int], rows: int) -> int:
    """Return where the rows are in a result of an equation.

    Args:
      eqn: The equation, without a body.
      number: Which of its results.
      axes: Where they are in its operands.
      rows: How many there are.
    """
    if all(axis == NO_AXIS for axis in axes):
        return NO_AXIS
    if LOST in axes:
        return LOST
    rule = _RULES.get(eqn.primitive.name, _same_shape)
    shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in eqn.invars]
    axis = rule(eqn.params, axes, shapes, tuple(getattr(eqn.outvars[number].aval, "shape", ())))
    out = getattr(eqn.outvars[number].aval, "shape", ())
    return axis if axis < 0 or (axis < len(out) and out[axis] % rows == 0) else LOST


type _Shapes = Sequence[tuple[int, ...]]


def _same_shape(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    """Return the axis where operands have the result's shape, but for axes of size 1 that are repeated."""
    del params
    alike = lambda shape: len(shape) == len(out) and all(a in (1, b) for a, b in zip(shape, out, strict=True))
    return joined(axis if alike(shape) else LOST for axis, shape in zip(axes, shapes, strict=True) if axis != NO_AXIS)


def _broadcast(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    del shapes, out
    return int(params["broadcast_dimensions"][axes[0]])


def _transpose(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    del shapes, out
    return tuple(params["permutation"]).index(axes[0])


def _reshape(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    """Return the axis that begins where the rows' axis began; it is the same, or has the rows as its slower part."""
    if params.get("dimensions") is not None:
        return LOST
    before = math.prod(shapes[0][: axes[0]])
    begins = [math.prod(out[:axis]) == before and out[axis] != 1 for axis in range(len(out))]
    return begins.index(True) if True in begins else LOST


def _without(axes: Iterable[int], axis: int) -> int:
    """Return the axis once others are taken out."""
    return axis - sum(other < axis for other in axes)


def _reduce(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    del shapes, out
    gone = params.get("axes", params.get("dimensions", ()))
    kept = [axis for axis in axes if axis != NO_AXIS]
    return LOST if kept[0] in gone else _without(gone, kept[0])


def _dot_general(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    del out
    contracted, batch = params["dimension_numbers"]
    places = []
    for side, axis in enumerate(axes):
        if axis == NO_AXIS:
            continue
        if axis in contracted[side]:
            return LOST  # unless it is summed, which `_mixes` sees
        if axis in batch[side]:
            places.append(tuple(batch[side]).index(axis))
            continue
        free = _without((*contracted[side], *batch[side]), axis) + len(batch[0])
        others = len(shapes[0]) - len(contracted[0]) - len(batch[0]) if side else 0
        places.append(free + others)
    return joined(places)


def _convolution(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    del shapes, out
    numbers = params["dimension_numbers"]
    whole = axes[1] == NO_AXIS and axes[0] == numbers.lhs_spec[0] and params["batch_group_count"] == 1
    return int(numbers.out_spec[0]) if whole else LOST


def _gather(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    """Return the axis of the indices' rows: each of them reads its own entry of a table."""
    if axes[0] != NO_AXIS or len(axes) < 2 or axes[1] == len(shapes[1]) - 1:
        return LOST
    numbers = params["dimension_numbers"]
    by_index = [axis for axis in range(len(out)) if axis not in numbers.offset_dims]
    return by_index[axes[1]]


def _joined_along(key: str) -> Callable[..., int]:
    def rule(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
        del shapes, out
        axis = joined(axes)
        return LOST if axis == params[key] else axis

    return rule


def _same_size(params: dict[str, Any], axes: Sequence[int], shapes: _Shapes, out: tuple[int, ...]) -> int:
    del params
    axis = axes[0]
    return axis if joined(axes) == axis >= 0 and len(shapes[0]) == len(out) and shapes[0][axis] == out[axis] else LOST


_REDUCED = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
_OF_ONE_SIZE = (
    *("slice", "dynamic_slice", "pad", "rev", "sort", "cumsum", "top_k"),
    *("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
)
_RULES: dict[str, Callable[..., int]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reduce,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "concatenate": _joined_along("dimension"),
    "split": _joined_along("axis"),
    **dict.fromkeys(_REDUCED, _reduce),
    **dict.fromkeys(_OF_ONE_SIZE, _same_size),
}
