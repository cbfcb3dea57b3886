"""Traced programs: equations of higher order, their parameters, and how they are made again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import closed_call_p, cond_p, jit_p, remat_p, scan_p, while_p


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


@contextlib.contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """Restore what stood around an equation when it was traced: names of scopes, metadata, meshes, kinds of compute."""
    with contextlib.ExitStack() as stack:
        for scope in getattr(eqn.source_info.name_stack, "stack", ()):
            if type(scope).__name__ == "Scope":  # not the names of transformations
                stack.enter_context(jax.named_scope(scope.name))
        stack.enter_context(eqn.ctx.manager)
        yield


def closed(jaxpr: Any) -> ClosedJaxpr:
    """Return a jaxpr with its constants attached (a remat equation holds an open one, without any)."""
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, [])


def shape_of(atom: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of a variable or literal of a jaxpr."""
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is an array of typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# The parameters that a higher-order equation must have, and those that it may have, so that it can be rebuilt. With
# others, from a newer JAX, something unknown would be lost, so the equation is left alone.
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


def constrained(values: Any, shardings: Any) -> list[Any]:
    """Return the values, held to those shardings of a `jit` equation that are given."""
    return [
        value if type(sharding).__name__ == "UnspecifiedValue" else jax.lax.with_sharding_constraint(value, sharding)
        for value, sharding in zip(values, shardings, strict=True)
    ]
