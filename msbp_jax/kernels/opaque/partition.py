"""How XLA may split a native call over devices, where `jit` is given sharded arrays: by whole groups of rows.

XLA cannot look into a foreign call and would gather its operands. Told that the rows of the gradient, the groups of the
compact cotangent and the rows of x are one axis, it leaves them where they are: the selection and dx need nothing from
other devices; dw is summed over them as in a dense backward, and so are what is left for the memory and its rows.

Where all rows are one group, that axis is the group's own: the devices add up their scores, n numbers, and choose
alike. A batch axis, of experts or of blocks of rows that choose for themselves, is split where it is sharded.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from msbp_jax import _compat

type Call = Callable[..., tuple[jax.Array, ...]]
type Shapes = Sequence[tuple[tuple[int, ...], Any]]
type Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Which axes of a call's arrays are rows or groups; results that have neither are added up over devices.

    Attributes:
      rule: The axes of operands and results in Shardy's notation; "{rows}" and "{values}" have rows or groups in front.
    """

    rule: str


SPLITS = {
    "select": Split("{rows} n -> {values}, {index}"),
    "select_with_memory": Split("{rows} n, n -> {values}, {index}, n, c"),
    "select_with_memory by slot": Split("{rows} n, {rows} n -> {values}, {index}, {rows} n, {rows} c"),
    "grad_input": Split("{values}, {index}, {scale}, a b -> {rows} m"),
    "grad_weight": Split("{values}, {index}, {scale}, {rows} m -> a b"),
    "native grad_input": Split("{values}, {index}, a b -> {rows} m"),
    "native grad_weight": Split("{values}, {index}, {rows} m -> a b"),
    "native dither": Split("{rows} n, {rows}, k, s -> {rows} n, {rows}"),
    "native row_moments": Split("{rows} n -> {rows} c"),
    "native entries grad_input": Split("{rows} n, s, a b -> {rows} m"),
    "native entries grad_weight": Split("{rows} n, s, {rows} m -> a b"),
    "native weight_times": Split("a, b, c, d, {rows} m -> {rows} n"),
    "native weight_gradient": Split("{rows} m, {rows} n, a, b -> c"),
    "native sparse_convolution": Split("a, b, c, d, {rows} h w m -> {rows} p q n"),
    "native sparse_convolution_gradient": Split("{rows} h w m, {rows} p q n, a, b -> c"),
}


def partitioned(
    split: Split,
    rows: int,
    group: int,
    results: Shapes,
    local_call: Callable[[Shapes], Call],
    choose_together: Callable[..., tuple[jax.Array, ...]] | None = None,
) -> Call:
    """Return a call that XLA may split.

    Args:
      split: How.
      rows: Rows of the gradient.
      group: Rows that share a choice.
      results: Shape and dtype of each result.
      local_call: Makes the call for results of given shapes.
      choose_together: What a selection does where devices have parts of its one group; takes the names of the mesh
        axes, then the operands.
    """
    whole = local_call(results)
    cut = _Cut(split.rule, rows, group)

    def lower(names: Names, shards: int) -> Call:
        if cut.one_group and names and choose_together is not None:
            choose = choose_together
            return lambda *arrays: choose(names, *arrays)
        local = local_call(cut.local_shapes(results, shards))

        def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            found = local(*arrays)
            if not names:
                return found
            axes = cut.result_axes
            return tuple(
                jax.lax.psum(result, names) if axis is None else result
                for axis, result in zip(axes, found, strict=True)
            )

        return call

    function = _compat.custom_partitioning(lambda *operands: whole(*operands))

    def partition(mesh: Any, operands: Any, out: Any) -> tuple[Any, ...]:
        del out
        names = cut.names(operands)
        shards = math.prod(mesh.shape[name] for name in names)
        if rows % (shards if cut.one_group else shards * group):
            names, shards = (), 1
        placed = [[_placed(mesh, names, axis) for axis in axes] for axes in (cut.result_axes, cut.operand_axes)]
        local = lower(names, shards)

        def lowered(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            with _compat.no_mesh():
                return local(*arrays)

        return mesh, lowered, tuple(placed[0]), tuple(placed[1])

    function.def_partition(partition=partition, sharding_rule=cut.sharding_rule)
    return _mapped(function, whole)


class _Cut:
    """Where the rows or groups stand in each array of a call."""

    def __init__(self, rule: str, rows: int, group: int) -> None:
        self.one_group = one_group = group >= rows
        # The mesh is not known yet. Unless groups divide evenly among all devices, XLA is told of no common axis.
        even = one_group or rows % (group * jax.device_count()) == 0
        axis = "g" if group == 1 or one_group else "(g r)"
        names = {"values": "e g k" if one_group else "g s k" if group == 1 else "g r k", "rows": axis}
        names["index"] = "e k" if one_group else "g k"
        names["scale"] = "e" if one_group else "g"
        filled = rule.format(**names)
        operands, results = ([part.split() for part in _fields(side)] for side in filled.split("->"))
        self.operand_axes, self.result_axes = ([_place(part) for part in side] for side in (operands, results))
        self.sharding_rule = filled if even else rule.format(values="g r k", index="g k", scale="g", rows="i")

    def names(self, operands: Any) -> Names:
        """Return the mesh axes over which the first operand that has rows is split."""
        for operand, axis in zip(operands, self.operand_axes, strict=True):
            if axis is not None:
                return names_on(operand, axis)
        return ()

    def local_shapes(self, results: Shapes, shards: int) -> Shapes:
        """Return the shapes of the results on one of so many devices."""
        return [
            (tuple(size // shards if i == axis else size for i, size in enumerate(shape)), dtype)
            for axis, (shape, dtype) in zip(self.result_axes, results, strict=True)
        ]


def _fields(side: str) -> list[str]:
    """Return the arrays of one side of a rule, "(g r)" being one axis."""
    return [part.replace("(g r)", "(g") for part in side.split(",")]


def _place(axes: list[str]) -> int | None:
    return next((place for place, axis in enumerate(axes) if axis.strip("(") == "g"), None)


def _placed(mesh: Any, names: Names, axis: int | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), names or None) if axis is not None else PartitionSpec())


def names_on(placed: Any, axis: int) -> Names:
    """Return the mesh axes over which an axis is split; none where XLA does not name them (arrays off the mesh)."""
    spec = getattr(placed.sharding, "spec", ())
    part = spec[axis] if len(spec) > axis else None
    return part if isinstance(part, tuple) else (part,) if part else ()


def _mapped(function: Call, plain: Call) -> Call:
    """Return a function with a rule for vmap, which a custom partitioning has not: its axis may be split."""
    mapped = jax.custom_batching.custom_vmap(lambda *operands: function(*operands))

    @mapped.def_vmap
    def _over_batch(size: int, batched: Sequence[bool], *operands: jax.Array) -> tuple[Any, Any]:
        axes = [0 if is_batched else None for is_batched in batched]
        over_batch = jax.vmap(plain, in_axes=axes)
        results = jax.eval_shape(over_batch, *operands)
        call = _compat.custom_partitioning(lambda *operands: over_batch(*operands))
        letters = (f"x{number}" for number in itertools.count())

        def axes_of(array: Any, is_batched: bool) -> str:
            return " ".join(["v"] * is_batched + [next(letters) for _ in range(array.ndim - is_batched)])

        def partition(mesh: Any, placed: Any, out: Any) -> tuple[Any, ...]:
            del out
            names = names_on(placed[batched.index(True)], 0)
            names = names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()
            operand_places = tuple(_placed(mesh, names, 0 if is_batched else None) for is_batched in batched)
            return mesh, over_batch, tuple(_placed(mesh, names, 0) for _ in results), operand_places

        left = ", ".join(axes_of(*pair) for pair in zip(operands, batched, strict=True))
        right = ", ".join(axes_of(result, True) for result in results)
        call.def_partition(partition=partition, sharding_rule=f"{left} -> {right}")
        return _mapped(call, over_batch)(*operands), tuple(True for _ in results)

    return mapped
