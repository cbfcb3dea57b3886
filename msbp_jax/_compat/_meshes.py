"""Devices: what differs between them, and how arrays are placed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core.primitives import closed_call_p


def zeros_placed_like(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Return zeros of a leaf's shape, placed on a mesh, and varying over devices, as it is."""
    sharding = jax.typeof(leaf).sharding
    zeros = jnp.zeros(leaf.shape, dtype, out_sharding=sharding if sharding.mesh.explicit_axes else None)
    return varying_like(zeros, leaf)


def placed_like(array: Any) -> jax.ShapeDtypeStruct:
    """Return an array's shape and dtype, and on a mesh of explicit axes where it lies."""
    sharding = jax.typeof(array).sharding
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding if sharding.mesh.explicit_axes else None)


def varying_alike(arrays: Any) -> tuple[list[Any], bool, Any]:
    """Return arrays made to vary over the same mesh axes under `shard_map`, as a foreign function wants them.

    The second result is whether they vary at all; the third makes the types of what it returns:
    `(shape, dtype) -> ShapeDtypeStruct`.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset[Any]().union(*axes)
    alike = [
        jax.lax.pcast(array, tuple(sorted(union - varying)), to="varying") if union - varying else array
        for array, varying in zip(arrays, axes, strict=True)
    ]
    kind = jax.typeof(alike[0]).manual_axis_type

    def result(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        if not union:
            return jax.ShapeDtypeStruct(shape, dtype)
        sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind)

    return alike, bool(union), result


def varying_like(array: Any, like: Any) -> Any:
    """Return an array made to vary over the mesh axes, under `shard_map`, over which another does."""
    return varying_over(array, jax.typeof(like).manual_axis_type.varying)


def varies(array: Any) -> bool:
    """Whether an array differs, by its type, between the devices of a `shard_map`."""
    return bool(jax.typeof(array).manual_axis_type.varying)


def varying_over(array: Any, axes: Iterable[str]) -> Any:
    """Return an array made to vary over mesh axes, under `shard_map`, those over which it does not yet."""
    missing = set(axes) - jax.typeof(array).manual_axis_type.varying
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def axes_lacked(array: Any, others: Any) -> list[str]:
    """Return the mesh axes, under `shard_map`, over which one of the others varies by its type and this array not."""
    axes = frozenset[str]().union(*(jax.typeof(other).manual_axis_type.varying for other in others))
    return sorted(axes - jax.typeof(array).manual_axis_type.varying)


def typed_like(array: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result that varies over the same mesh axes under `shard_map` as one operand."""
    kind = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def all_axes_manual() -> bool:
    """Whether the program now traced is the body of a `shard_map` over all axes of its mesh."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return bool(kinds) and all(kind == jax.sharding.AxisType.Manual for kind in kinds)


def call_varying(function: Any, arrays: Any) -> list[Any]:
    """Return the results of `function(*arrays)`, which vary over mesh axes as the arrays do, unseen by its types.

    It is for interpreted kernels, which mix arrays that vary with constants that do not.
    """
    axes = tuple(sorted(jax.typeof(arrays[0]).manual_axis_type.varying))
    plain = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays))
    results = closed_call_p.bind(*arrays, call_jaxpr=plain)
    return [jax.lax.pcast(result, axes, to="varying") for result in results]


def with_automatic_sharding(function: Any, arguments: Any, results: Any) -> Any:
    """Return `function(*arguments)`, leaving to XLA how arrays inside are sharded, also on a mesh of explicit axes.

    Args:
      function: What is called.
      arguments: Its arguments.
      results: A pytree like its result, of arrays sharded as the result is to be; None for whole arrays.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arguments)]
    explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if explicit is None:
        return function(*arguments)

    def sharding(like: Any) -> Any:
        return jax.sharding.PartitionSpec() if like is None else jax.typeof(like).sharding.spec

    specs = jax.tree.map(sharding, results, is_leaf=lambda leaf: leaf is None)
    with jax.sharding.use_abstract_mesh(explicit):
        return jax.sharding.auto_axes(function, out_sharding=specs)(*arguments)


def no_mesh() -> Any:
    """Return a context in which types say nothing of meshes: what runs on a device by itself knows of none."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def new_mesh_axes(params: dict[str, Any]) -> dict[str, int]:
    """Return the axes of the devices that a `shard_map` equation runs over, with their sizes, in the mesh's order."""
    mesh, new = params["mesh"], params["newly_manual_axes"]
    return {axis: mesh.shape[axis] for axis in mesh.axis_names if axis in new}


def axes_of_spec(spec: Any) -> frozenset[str]:
    """Return the mesh axes that a PartitionSpec names."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec if part is not None]
    return frozenset(axis for part in parts for axis in part if isinstance(axis, str))


def axes_of_collective(params: dict[str, Any]) -> Any:
    """Return the name or names of the mesh axes that a collective's equation works on."""
    return params.get("axes", params.get("axis_name", ()))


def varying_axes(atoms: Any) -> frozenset[str]:
    """Return the mesh axes over which variables vary by their types, which `shard_map(check_vma=True)` keeps."""
    return frozenset[str]().union(*(atom.aval.manual_axis_type.varying for atom in atoms))


def shard_map_like(params: dict[str, Any], body: Any, in_specs: Any) -> Any:
    """Return `body` mapped over devices as a `shard_map` equation has it, with other specifications of arguments."""
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=list(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
