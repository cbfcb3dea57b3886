"""Evaluate a program with rules in place of some of its contractions.

Everything without a site inside is evaluated as it stands. Higher-order equations with a site inside are rebuilt with
the public function they came from (`jax.jit`, `lax.scan`, `lax.switch`, `jax.checkpoint`, `jax.shard_map`), so that no
parameter of theirs has to be edited; `_compat.left_alone` says which are not.

Equations with a sparse weight among their operands are evaluated as `_sparse_operands` says: a product with it is a
sparse product, a cast or a transposition leaves it sparse, and whatever else takes it sees the dense weight.

A rebuilt equation is a function of its own, kept for the next time that it is met: outside of a `jit`, JAX would else
compile it anew at every step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from msbp_jax import _compat
from msbp_jax.rules import CONTRACTIONS, Rule, Site, sparse_contraction
from msbp_jax.sparsifiers._base import State
from msbp_jax.sparsifiers._keys import bits_as_keys, fold, keys_as_bits, split_keys
from msbp_jax.transform._discover import Loop, Place
from msbp_jax.transform._sparse_operands import dense, passed_on, prepared, sparse_product
from msbp_jax.weights import is_sparse


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """A site in a program: its rule, and the loops around it, outermost first."""

    rule: Rule
    loops: tuple[Loop, ...]


# By place, relative to the program or equation around them.
type Placeds = Mapping[Place, Placed]
type Sites = Mapping[Place, Site]


def evaluate(jaxpr: _compat.ClosedJaxpr, arguments: Sequence[Any], placed: Placeds, sites: Sites) -> list[Any]:
    """Return the results of a program whose contractions at certain places follow rules.

    Args:
      jaxpr: The program.
      arguments: Its arguments.
      placed: The rule of each sparse site, and the loops around it.
      sites: The state of each.
    """
    env: dict[_compat.Var, Any] = {}
    inner = jaxpr.jaxpr
    env.update(zip(inner.constvars, jaxpr.consts, strict=True))
    env.update(zip(inner.invars, arguments, strict=True))
    # The numbers of the equations that hold a site; the others are evaluated unchanged.
    with_sites = {place[0] for place in placed}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _compat.Literal) else env[atom]

    for number, eqn in enumerate(inner.eqns):
        inputs = [read(atom) for atom in eqn.invars]
        has_sparse = any(map(is_sparse, inputs))
        if has_sparse and (weight := passed_on(eqn, inputs)) is not None:
            env[eqn.outvars[0]] = weight
            continue
        if has_sparse:
            inputs = prepared(eqn, inputs)
            has_sparse = any(map(is_sparse, inputs))
        if number in with_sites or has_sparse:
            with _compat.context_of(eqn):
                results = list(_equation(eqn, inputs, _under(placed, number), _under(sites, number)))
        else:
            single, wanted = _compat.single_equation(eqn, inner)
            by_variable = {v: x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, _compat.Literal)}
            results = _compat.eval_jaxpr(single, [], *(by_variable[v] for v in wanted))
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in inner.outvars]


def _equation(eqn: _compat.JaxprEqn, inputs: list[Any], placed: Placeds, sites: Sites) -> Sequence[Any]:
    """Evaluate an equation that is a site or a product with a sparse weight, or has one inside."""
    if eqn.primitive.name not in CONTRACTIONS:
        return _rebuilt(_Equation(eqn.primitive, eqn.params), tuple(placed.items()))(inputs, sites)
    product = sparse_product(eqn, inputs)
    sparse = None if isinstance(product, str) else product
    # A constant of the program may be a NumPy array.
    operands = tuple(map(jnp.asarray, inputs if sparse is None else sparse[1]))
    if not placed:
        assert sparse is not None
        return [sparse[0].forward(*operands)]
    rule = placed[()].rule
    if sparse is not None:
        rule = dataclasses.replace(rule, operation=sparse[0])
    return [sparse_contraction(rule, operands, sites[()])]


class _Equation:
    """A higher-order equation without its variables: equal to another whose parameters are the same objects."""

    def __init__(self, primitive: Any, params: dict[str, Any]) -> None:
        self.primitive = primitive
        self.params = params
        self._identity = (primitive, *((name, _identity(value)) for name, value in sorted(params.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Equation) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def _identity(value: Any) -> Any:
    """Return something hashable that is equal for parameters that may stand for one another."""
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    try:
        hash(value)
    except TypeError:
        return id(value)  # unique, as the equation keeps the value alive
    return value


@functools.lru_cache(maxsize=512)
def _rebuilt(eqn: _Equation, placed: tuple[tuple[Place, Placed], ...]) -> Callable[[list[Any], Sites], list[Any]]:
    """Return a higher-order equation as a function of its inputs and of the sites inside."""
    build = {
        _compat.jit_p: _jit,
        _compat.closed_call_p: _jit,
        _compat.remat_p: _remat,
        _compat.cond_p: _cond,
        _compat.scan_p: _scan,
    }.get(eqn.primitive, _shard_map)  # discover() seals all others
    return build(eqn.params, dict(placed))


def _body(jaxpr: Any, placed: Placeds, name: str) -> Callable[[list[Any], Sites], list[Any]]:
    def body(arguments: list[Any], sites: Sites) -> list[Any]:
        return evaluate(_compat.closed(jaxpr), arguments, placed, sites)

    body.__name__ = body.__qualname__ = name
    return body


def _inlined(function: Callable[[list[Any], Sites], Any]) -> Callable[[list[Any], Sites], list[Any]]:
    """Compile what JAX would trace anew at every call, its function being a new one."""
    return jax.jit(function, inline=True)


def _jit(params: dict[str, Any], placed: Placeds) -> Callable[[list[Any], Sites], list[Any]]:
    if "call_jaxpr" in params:
        return _body(params["call_jaxpr"], placed, "closed_call")
    compiled = _compat.jit_like(params, _body(params["jaxpr"], placed, params["name"]))

    def call(inputs: list[Any], sites: Sites) -> list[Any]:
        with _compat.mesh_of(params):
            inputs = _compat.constrained(inputs, params["in_shardings"])
            return _compat.constrained(compiled(inputs, sites), params["out_shardings"])

    return call


def _remat(params: dict[str, Any], placed: Placeds) -> Callable[[list[Any], Sites], list[Any]]:
    body = _body(params["jaxpr"], placed, "checkpoint")
    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])


def _cond(params: dict[str, Any], placed: Placeds) -> Callable[[list[Any], Sites], list[Any]]:
    branches = [
        _body(branch, _under(placed, number), f"branch_{number}") for number, branch in enumerate(params["branches"])
    ]

    platforms = params.get("branches_platforms")

    def cond(inputs: list[Any], sites: Sites) -> list[Any]:
        bits, kinds = keys_as_bits(sites)  # under vmap a cond is a select, which counts as a use of both its keys

        def of_branch(number: int) -> Callable[[list[Any], Any], list[Any]]:
            branch = branches[number]
            return lambda inputs, bits: list(map(dense, branch(inputs, _under(bits_as_keys(bits, kinds), number))))

        every = [of_branch(number) for number in range(len(branches))]
        if platforms is None:
            return lax.switch(inputs[0], every, inputs[1:], bits)
        by_platform = {name: branch for names, branch in zip(platforms, every, strict=True) for name in names or ()}
        default = next((branch for names, branch in zip(platforms, every, strict=True) if names is None), None)
        return lax.platform_dependent(inputs[1:], bits, default=default, **by_platform)

    return _inlined(cond)


def _scan(params: dict[str, Any], placed: Placeds) -> Callable[[list[Any], Sites], list[Any]]:
    consts, carries = _compat.scan_arity(params)
    length = params["length"]
    inside = {place: dataclasses.replace(entry, loops=entry.loops[1:]) for place, entry in placed.items()}
    step = _body(params["jaxpr"], inside, "scan")
    stacked = {place for place, entry in placed.items() if entry.loops[0].instances}

    def scan(inputs: list[Any], sites: Sites) -> list[Any]:
        fixed, carry, sliced = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]
        shared = {place: site for place, site in sites.items() if place not in stacked}
        # All steps share one memory, but each draws with a key of its own.
        keys = {p: [_keys_of_steps(leaf, length) for leaf in jax.tree.leaves(s.state)] for p, s in shared.items()}

        def body(carry: list[Any], now: tuple[list[Any], Sites, Any]) -> tuple[list[Any], list[Any]]:
            arguments, sliced_sites, step_keys = now
            drawn = {p: site._replace(state=_with_keys(site.state, step_keys[p])) for p, site in shared.items()}
            results = list(map(dense, step([*fixed, *carry, *arguments], {**sliced_sites, **drawn})))
            return results[:carries], results[carries:]

        xs = (sliced, {place: sites[place] for place in stacked}, keys)
        options = {"length": length, "reverse": params["reverse"], "unroll": params["unroll"]}
        final, outputs = lax.scan(body, carry, xs, **options)
        return [*final, *outputs]

    return _inlined(scan)


def _shard_map(params: dict[str, Any], placed: Placeds) -> Callable[[list[Any], Sites], list[Any]]:
    """Rebuild a `shard_map`. A memory that devices share is whole on each; one for each device is cut up in front."""
    width = len(_compat.new_mesh_axes(params))
    axes = {place: entry.loops[:width] for place, entry in placed.items()}
    inside = {place: dataclasses.replace(entry, loops=entry.loops[width:]) for place, entry in placed.items()}
    site_specs = {p: PartitionSpec(*(axis.mesh_axis for axis in axes[p] if axis.instances)) for p in placed}
    step = _body(params["jaxpr"], inside, "shard_map")

    def body(arguments: list[Any], sites: Sites) -> list[Any]:
        mine = {p: jax.tree.map(lambda leaf, p=p: _of_device(leaf, axes[p]), site) for p, site in sites.items()}
        return step(arguments, mine)

    def mapped(inputs: list[Any], sites: Sites) -> list[Any]:
        specs = {p: jax.tree.map(lambda _, p=p: site_specs[p], site) for p, site in sites.items()}
        return _compat.shard_map_like(params, body, (list(params["in_specs"]), specs))(inputs, sites)

    return _inlined(mapped)


def _under[T](places: Mapping[Place, T], number: int) -> dict[Place, T]:
    return {place[1:]: value for place, value in places.items() if place[0] == number}


def _of_device(leaf: jax.Array, axes: tuple[Loop, ...]) -> jax.Array:
    """Return a device's own part of a leaf; where devices share a key, each draws with one made from it."""
    mine = leaf.reshape(leaf.shape[sum(axis.instances for axis in axes) :])
    if _compat.is_key(mine):
        for axis in axes:
            if axis.sharded and not axis.instances:
                mine = fold(mine, lax.axis_index(axis.mesh_axis))
    return mine


def _keys_of_steps(leaf: jax.Array, length: int) -> jax.Array | None:
    return split_keys(leaf, length) if _compat.is_key(leaf) else None


def _with_keys(state: State, keys: list[jax.Array | None]) -> State:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [b if k is None else k for b, k in zip(leaves, keys, strict=True)])
