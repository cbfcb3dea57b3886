"""How XLA may split a native call over devices, where `jit` is given sharded arrays: by whole groups of rows.

XLA cannot look into a foreign call and would gather its operands. Told that the rows of the gradient, the groups of the
compact cotangent and the rows of x are one axis, it leaves them where they are: the selection and dx need nothing from
other devices, dw is summed over them as in a dense backward, and the memory of all rows is the mean of the devices'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from msbp_jax import _compat

type Call = Callable[..., tuple[jax.Array, ...]]
type Shapes = Sequence[tuple[tuple[int, ...], Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Which arrays of a call have rows or groups on their first axis, and what becomes of results that have not.

    Attributes:
      operands: Whether each operand has.
      results: Whether each result has.
      rule: The same in Shardy's notation.
      combine: `jax.lax.psum` or `pmean` for the results that have not.
    """

    operands: tuple[bool, ...]
    results: tuple[bool, ...]
    rule: str
    combine: Callable[..., Any] = jax.lax.psum


SPLITS = {
    "select": Split((True,), (True, True), "{rows} n -> g r k, g k"),
    "select_with_memory": Split(
        (True, False), (True, True, False), "{rows} n, n -> g r k, g k, n", combine=jax.lax.pmean
    ),
    "select_with_memory by slot": Split((True, True), (True, True, True), "{rows} n, {rows} n -> g r k, g k, {rows} n"),
    "grad_input": Split((True, True, False), (True,), "g r k, g k, a b -> {rows} m"),
    "grad_weight": Split((True, True, True), (False,), "g r k, g k, {rows} m -> a b"),
}


def partitioned(split: Split, rows: int, group: int, results: Shapes, local_call: Callable[[Shapes], Call]) -> Call:
    """Return a call that XLA may split by groups of rows.

    Args:
      split: What may be split.
      rows: Rows of the gradient.
      group: Rows that share a choice.
      results: Shape and dtype of each result.
      local_call: Makes the call for results of given shapes.
    """
    whole = local_call(results)

    @jax.custom_batching.custom_vmap
    def function(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return custom(*operands)

    @function.def_vmap
    def _over_batch(size: int, batched: Sequence[bool], *operands: jax.Array) -> tuple[Any, Any]:
        axes = [0 if is_batched else None for is_batched in batched]
        out = jax.vmap(whole, in_axes=axes, axis_size=size)(*operands)
        return out, tuple(True for _ in out)

    custom = _compat.custom_partitioning(lambda *operands: whole(*operands))

    def partition(mesh: Any, operands: Any, out: Any) -> tuple[Any, ...]:
        del out
        spec = operands[0].sharding.spec
        axes = spec[0] if len(spec) else None
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        shards = math.prod(mesh.shape[name] for name in names)
        names = names if even and rows % (shards * group) == 0 else ()
        shards = shards if names else 1
        placed = [NamedSharding(mesh, PartitionSpec(names or None)), NamedSharding(mesh, PartitionSpec())]
        local = local_call(
            [
                ((shape[0] // shards, *shape[1:]) if is_split else shape, dtype)
                for is_split, (shape, dtype) in zip(split.results, results, strict=True)
            ]
        )

        def lower(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            found = local(*arrays)
            if not names:
                return found
            return tuple(
                one if is_split else split.combine(one, names)
                for is_split, one in zip(split.results, found, strict=True)
            )

        return (
            mesh,
            lower,
            tuple(placed[0 if is_split else 1] for is_split in split.results),
            tuple(placed[0 if is_split else 1] for is_split in split.operands),
        )

    # Groups are split where they go evenly into all devices, whatever the mesh; else XLA is told of no common axis.
    even = rows % (group * jax.device_count()) == 0
    one_axis = "i" if not even else "g" if group == 1 else "(g r)"
    rule = split.rule.format(rows=one_axis)
    if group == 1:
        rule = rule.replace("g r k", "g s k")
    custom.def_partition(partition=partition, sharding_rule=rule)
    return function
