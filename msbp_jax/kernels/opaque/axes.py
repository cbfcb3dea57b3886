"""How a computation may be split over devices by the axes of its arrays, written as those of a product.

    i n, i, m n -> i m        dx of rows: i and m stay where they are, n is summed over

XLA looks into what is not a foreign call, but splits what it finds there operation by operation: a gather of the rows
that are kept would fetch them from all devices. Told of the axes of the whole, every device runs it on its own part,
and results are added up over the devices that share an axis which no result has, as in a dense product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from msbp_jax import _compat
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.opaque.export import unless_exporting
from msbp_jax.kernels.opaque.partition import Call, Names, Shapes, names_on

type Axes = tuple[str, ...]  # an array's, a letter each; one that is a capital is whole on every device


def by_axes(
    rule: str,
    results: Sequence[tuple[tuple[Any, ...], Any]],
    local_call: Callable[[Shapes], Call],
    operands: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """Run a computation that XLA may split; not inside a `shard_map`, where it runs on what is there.

    Where JAX cannot split it, on several TPUs (github.com/jax-ml/jax/issues/38196) and in an exported program, or
    where sizes are not known, it is the plain computation, as it is where it is differentiated.

    Args:
      rule: The axes of operands and results, such as "i n, i, m n -> i m".
      results: Shape and dtype of each result.
      local_call: Makes the computation for results of given shapes; it gives a tuple.
      operands: Its arrays. It may use no other.
    """
    if any(_compat.is_symbolic(*operand.shape) for operand in operands):
        return local_call([])(*operands)
    plain = local_call(results)
    inside = _compat.all_axes_manual() or any(map(_compat.varies, operands))
    if inside or jax.device_count() == 1 or target.platform() == "tpu":
        return plain(*operands)
    left, right = ([tuple(part.split()) for part in side.split(",")] for side in rule.split("->"))
    return _differentiable(_split(left, right, results, local_call), plain)(*operands)


def _differentiable(call: Call, plain: Call) -> Call:
    """Return a call whose derivative is that of the plain computation."""
    function = jax.custom_jvp(lambda *arrays: call(*arrays))

    @function.defjvp
    def _derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(plain, primals, tangents)

    return function


def _split(
    operand_axes: Sequence[Axes], result_axes: Sequence[Axes], results: Shapes, local_call: Callable[[Shapes], Call]
) -> Call:
    plain = local_call(results)
    function = _compat.custom_partitioning(lambda *operands: plain(*operands))

    def partition(mesh: Any, operands: Any, out: Any) -> tuple[Any, ...]:
        del out
        names = _names_of_axes(mesh, operand_axes, operands)
        shards = {axis: math.prod(mesh.shape[name] for name in on) for axis, on in names.items()}
        parts = [
            (tuple(size // shards.get(axis, 1) for axis, size in zip(axes, shape, strict=True)), dtype)
            for axes, (shape, dtype) in zip(result_axes, results, strict=True)
        ]
        local = local_call(parts)
        sums = [tuple(name for axis, on in names.items() if axis not in axes for name in on) for axes in result_axes]

        def lowered(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            with _compat.no_mesh():
                found = local(*arrays)
                return tuple(jax.lax.psum(part, over) if over else part for part, over in zip(found, sums, strict=True))

        def placed(axes: Axes) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(names.get(axis) for axis in axes)))

        return mesh, lowered, tuple(map(placed, result_axes)), tuple(map(placed, operand_axes))

    written = [", ".join(map(" ".join, side)) for side in (operand_axes, result_axes)]
    letters = dict.fromkeys(axis for axes in operand_axes for axis in axes)
    function.def_partition(
        partition=partition,
        sharding_rule=" -> ".join(written),
        need_replication_factors=tuple(axis for axis in letters if axis.isupper()),
    )
    mapped = jax.custom_batching.custom_vmap(lambda *operands: unless_exporting(function, plain, *operands))

    @mapped.def_vmap
    def _over_batch(size: int, batched: Sequence[bool], *operands: jax.Array) -> tuple[Any, Any]:
        axis = _another(letters)
        within = [0 if is_batched else None for is_batched in batched]
        call = _split(
            [(axis, *axes) if is_batched else axes for axes, is_batched in zip(operand_axes, batched, strict=True)],
            [(axis, *axes) for axes in result_axes],
            [((size, *shape), dtype) for shape, dtype in results],
            lambda parts: jax.vmap(local_call([(shape[1:], dtype) for shape, dtype in parts]), in_axes=within),
        )
        return call(*operands), tuple(True for _ in results)

    return mapped


def _names_of_axes(mesh: Any, operand_axes: Sequence[Axes], operands: Sequence[Any]) -> dict[str, Names]:
    """Return over which axes of the mesh each axis is split; the operand that comes first decides."""
    found: dict[str, Names] = {}
    for axes, operand in zip(operand_axes, operands, strict=True):
        for place, axis in enumerate(axes):
            taken = {name for on in found.values() for name in on}
            names = tuple(name for name in names_on(operand, place) if name not in taken)
            even = operand.shape[place] % math.prod(mesh.shape[name] for name in names) == 0
            if names and axis not in found and even and not axis.isupper():
                found[axis] = names
    return found


def _another(letters: Any) -> str:
    """Return a letter that is not among these, for a batch axis."""
    return next(letter for letter in "vutsrq" if letter not in letters)
