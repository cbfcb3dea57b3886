"""Every import and every fact that depends on the JAX version, and nothing else.

JAX moves its jaxpr internals between releases. Whoever ports the library to a new JAX reads this file, and only this
file, to see what it stands on. All names below are public (`jax.extend.core`, `jax.core`); the helpers hide parameter
layouts that have changed before.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as Tracer
from jax.core import eval_jaxpr as eval_jaxpr
from jax.custom_derivatives import CustomVJPPrimal as CustomVJPPrimal
from jax.custom_derivatives import SymbolicZero as SymbolicZero
from jax.experimental import pallas as pallas
from jax.experimental.custom_partitioning import custom_partitioning as custom_partitioning
from jax.experimental.pallas import tpu as pallas_tpu  # noqa: F401
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import Var as Var
from jax.extend.core import jaxprs_in_params as jaxprs_in_params
from jax.extend.core.primitives import closed_call_p as closed_call_p
from jax.extend.core.primitives import cond_p as cond_p
from jax.extend.core.primitives import custom_jvp_call_p as custom_jvp_call_p
from jax.extend.core.primitives import custom_vjp_call_p as custom_vjp_call_p
from jax.extend.core.primitives import dynamic_slice_p as dynamic_slice_p
from jax.extend.core.primitives import gather_p as gather_p
from jax.extend.core.primitives import jit_p as jit_p
from jax.extend.core.primitives import remat_p as remat_p
from jax.extend.core.primitives import scan_p as scan_p
from jax.extend.core.primitives import while_p as while_p
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

# The tracers of forward-mode and reverse-mode differentiation. Only the first is exported, so both go by name.
_DIFFERENTIATION_TRACERS = frozenset({"JVPTracer", "LinearizeTracer"})


try:
    from jax.experimental.pallas import triton as pallas_triton
except ImportError:  # deprecated since JAX 0.11, to be removed in some later version
    pallas_triton = None  # type: ignore[assignment]


def define_vjp_with_logs(function: Any, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
    """Give a `jax.custom_vjp` function its rules.

    The backward returns `(cotangents, logs)`; the forward is told, of each argument, whether it is differentiated.
    """
    function.defvjp_with_logs(fwd, bwd, symbolic_zeros=True)


def is_primal(node: Any) -> bool:
    """Whether `node` is an argument of a forward rule: an array with whether it is differentiated."""
    return isinstance(node, CustomVJPPrimal)


def is_symbolic_zero(cotangent: Any) -> bool:
    """Whether a cotangent is known to be 0."""
    return isinstance(cotangent, SymbolicZero)


def pull_back_with_logs(pullback: Any, cotangent: Any) -> tuple[Any, dict[Any, Any]]:
    """Apply a pullback of `jax.vjp` and return `(cotangents, logs)`, where `logs` is what the rules logged."""
    return pullback.with_logs(cotangent)


def split_branch_log(log: Any) -> tuple[Any, list[Any]] | None:
    """Split the log of a rule inside `lax.cond` into (index of the branch that ran, one log or None a branch)."""
    if type(log).__name__ == "CondSum":
        return log.index, list(log.branches)
    return None


def make_jaxpr(function: Callable[..., Any], arguments: tuple[Any, ...], *, any_axes: bool) -> ClosedJaxpr:
    """Return the jaxpr of a function.

    Args:
      function: Traced.
      arguments: Arrays, or their shapes and dtypes.
      any_axes: Whether the function may name axes of a `vmap` or `pmap` that is not around it, as when a model that is
        trained under one is only to be described; an axis then has one member.
    """
    axes: list[tuple[str, int]] = []
    while True:
        try:
            return jax.make_jaxpr(function, axis_env=axes)(*arguments)
        except NameError as error:
            found = re.search(r"unbound axis name: (\w+)", str(error))
            if not any_axes or found is None or found[1] in dict(axes):
                raise
            axes.append((found[1], 1))


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Return (number of constants, number of carries) of a `scan` equation."""
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def single_equation(eqn: JaxprEqn, enclosing: Jaxpr) -> tuple[Jaxpr, list[Var]]:
    """Wrap one equation of `enclosing` as a jaxpr; the second result is the variables it wants as arguments."""
    invars = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
    debug_info = enclosing.debug_info.with_unknown_names()
    return Jaxpr([], invars, list(eqn.outvars), [eqn], eqn.effects, debug_info=debug_info), invars


def under_differentiation(leaf: Any) -> bool:
    """Whether `leaf` is, as far as can be seen from here, being differentiated (an enclosing jit hides it)."""
    for _ in range(16):  # as deep as transformations are ever nested
        if not isinstance(leaf, Tracer):
            return False
        if type(leaf).__name__ in _DIFFERENTIATION_TRACERS:
            return True
        leaf = getattr(leaf, "val", None)  # look through vmap
    return False


def zeros_placed_like(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Return zeros of a leaf's shape, placed on a mesh, and varying over devices, as it is."""
    sharding = jax.typeof(leaf).sharding
    zeros = jnp.zeros(leaf.shape, dtype, out_sharding=sharding if sharding.mesh.explicit_axes else None)
    return varying_like(zeros, leaf)


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is an array of typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def shape_of(atom: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of a variable or literal of a jaxpr."""
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def varying_alike(arrays: Any) -> tuple[list[Any], bool, Any]:
    """Return arrays made to vary over the same mesh axes under `shard_map`, as a foreign function wants them.

    The second result is whether they vary at all; the third makes the types of what it returns:
    `(shape, dtype) -> ShapeDtypeStruct`.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    together = frozenset[Any]().union(*axes)
    alike = [
        jax.lax.pcast(array, tuple(sorted(together - own)), to="varying") if together - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]
    kind = jax.typeof(alike[0]).manual_axis_type

    def result(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        if not together:
            return jax.ShapeDtypeStruct(shape, dtype)
        sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind)

    return alike, bool(together), result


def varying_like(array: Any, like: Any) -> Any:
    """Return an array made to vary over the mesh axes, under `shard_map`, over which another does."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(array).manual_axis_type.varying
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


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


# What is known of the higher-order equations that are rebuilt: the parameters that one must have, and may have. Where a
# newer JAX has others, nobody knows what would be lost, and the equation is left alone.
_SHARD_MAP = "shard_map"  # not exported: known by its name
_PARAMETERS: dict[Any, tuple[set[str], set[str]]] = {
    jit_p: (
        {"jaxpr", "in_shardings", "out_shardings", "in_layouts", "out_layouts", "donated_invars", "ctx_mesh", "name"}
        | {"keep_unused", "inline", "compiler_options_kvs"},
        set(),
    ),
    remat_p: ({"jaxpr", "prevent_cse", "differentiated", "policy"}, set()),
    scan_p: ({"jaxpr", "length", "reverse", "unroll", "ft_in", "ft_out"}, set()),
    cond_p: ({"branches"}, {"branches_platforms"}),
    closed_call_p: ({"call_jaxpr"}, set()),
    while_p: ({"cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts"}, set()),
    _SHARD_MAP: ({"jaxpr", "mesh", "in_specs", "out_specs", "check_vma", "newly_manual_axes"}, set()),
}


def left_alone(eqn: JaxprEqn) -> str:
    """Return why a higher-order equation of a kind that is rebuilt cannot be; "" if it can, or is of another kind."""
    name = eqn.primitive.name
    known = _PARAMETERS.get(_SHARD_MAP if name == _SHARD_MAP else eqn.primitive)
    if known is None:
        return ""
    needed, optional = known
    if unknown := sorted(set(eqn.params) - needed - optional):
        return f"inside {name}, whose parameter {', '.join(unknown)} this version of msbp_jax does not know"
    if missing := sorted(needed - set(eqn.params)):
        return f"inside {name}, which lacks the parameter {', '.join(missing)} in this version of JAX"
    params = eqn.params
    if eqn.primitive is jit_p and any(layout is not None for layout in (*params["in_layouts"], *params["out_layouts"])):
        return "inside a jit that holds its arguments or results to layouts"
    if eqn.primitive is remat_p and (params["differentiated"] or not isinstance(params["prevent_cse"], bool)):
        return "inside a checkpoint that is differentiated already, or keeps its arguments apart one by one"
    return ""


def jit_like(params: dict[str, Any], body: Callable[[list[Any], Any], Any]) -> Callable[[list[Any], Any], Any]:
    """Return `body(inputs, further)` compiled as a `jit` equation of these parameters is."""
    count = len(params["donated_invars"])
    donated = tuple(number for number, is_donated in enumerate(params["donated_invars"]) if is_donated)
    flat = lambda *args: body(list(args[:count]), args[count])
    flat.__name__ = flat.__qualname__ = params["name"]
    compiled = jax.jit(
        flat,
        donate_argnums=donated or None,
        keep_unused=params["keep_unused"],
        inline=params["inline"],
        compiler_options=dict(params["compiler_options_kvs"]) or None,
    )
    return lambda inputs, further: compiled(*inputs, further)


def mesh_of(params: dict[str, Any]) -> Any:
    """Return the context of the mesh that a `jit` equation was made under, where it is not the one we are under."""
    mesh = getattr(params["ctx_mesh"], "abstract_mesh", params["ctx_mesh"])
    if mesh.empty or mesh == jax.sharding.get_abstract_mesh():
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def closed(jaxpr: Any) -> ClosedJaxpr:
    """Return a jaxpr with its constants attached (a remat equation holds an open one, without any)."""
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, [])


def constrained(values: Any, shardings: Any) -> list[Any]:
    """Return the values, held to those shardings of a `jit` equation that are given."""
    return [
        value if type(sharding).__name__ == "UnspecifiedValue" else jax.lax.with_sharding_constraint(value, sharding)
        for value, sharding in zip(values, shardings, strict=True)
    ]


def exporting(context: Any) -> bool:
    """Whether the program that a lowering rule is asked to lower goes into a file of `jax.export`."""
    return bool(getattr(context.module_context.lowering_parameters, "for_export", False))


def serializable(state: Any) -> None:
    """Let `jax.export` write the name of a NamedTuple of this package into its files."""
    jax.export.register_namedtuple_serialization(state, serialized_name=f"msbp_jax.{state.__name__}")


def is_symbolic(*sizes: Any) -> bool:
    """Whether one of these sizes is a dimension variable of `jax.export`, of which little is known."""
    return not all(isinstance(size, int | np.integer) for size in sizes)
