"""Evaluate a program with rules in place of some of its contractions.

Everything without a site inside is evaluated as it stands. Higher-order equations with a site inside are rebuilt with
the public function they came from (`jax.jit`, `lax.scan`, `lax.switch`, `jax.checkpoint`, `jax.shard_map`), so that no
parameter of theirs has to be edited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from msbp_jax import _compat
from msbp_jax.rules import CONTRACTIONS, Rule, sparse_contraction
from msbp_jax.sparsifiers._base import State, split_keys
from msbp_jax.transform._discover import Loop, Place

States = Mapping[Place, State]


def evaluate(
    jaxpr: _compat.ClosedJaxpr,
    arguments: Sequence[Any],
    rules: Mapping[Place, Rule],
    loops: Mapping[Place, tuple[Loop, ...]],
    states: States,
) -> list[Any]:
    """Return the results of a program whose contractions at the places of `rules` follow those rules.

    Args:
      jaxpr: The program.
      arguments: Its arguments.
      rules: The rule of each sparse site.
      loops: The scans around each sparse site.
      states: The state of each sparse site.
    """
    return _Evaluator(rules, loops).closed(jaxpr, arguments, (), 0, dict(states))


class _Evaluator:
    def __init__(self, rules: Mapping[Place, Rule], loops: Mapping[Place, tuple[Loop, ...]]) -> None:
        self.rules = rules
        self.loops = loops
        # Every place on the way to a site: what is not here is evaluated as it stands.
        self.on_the_way = {place[:depth] for place in rules for depth in range(1, len(place) + 1)}

    def closed(self, jaxpr: Any, arguments: Sequence[Any], place: Place, depth: int, states: States) -> list[Any]:
        """Evaluate a jaxpr at `place`, inside `depth` scans."""
        env: dict[_compat.Var, Any] = {}
        inner = jaxpr.jaxpr
        env.update(zip(inner.constvars, jaxpr.consts, strict=True))
        env.update(zip(inner.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, _compat.Literal) else env[atom]

        for number, eqn in enumerate(inner.eqns):
            here = (*place, number)
            if here not in self.on_the_way:
                single, wanted = _compat.single_equation(eqn, inner)
                results = _compat.eval_jaxpr(single, [], *(env[v] for v in wanted))
            else:
                inputs = [read(atom) for atom in eqn.invars]
                results = list(self.equation(eqn, inputs, here, depth, _under(states, here)))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in inner.outvars]

    def equation(
        self, eqn: _compat.JaxprEqn, inputs: list[Any], place: Place, depth: int, states: States
    ) -> Sequence[Any]:
        """Evaluate an equation that is a site or has one inside."""
        params = eqn.params
        if eqn.primitive.name in CONTRACTIONS:
            return [sparse_contraction(self.rules[place], tuple(inputs), states[place])]
        match eqn.primitive:
            case _compat.closed_call_p:
                return self.closed(params["call_jaxpr"], inputs, place, depth, states)
            case _compat.jit_p:
                body = self._function(params["jaxpr"], place, depth, params["name"])
                inputs = _compat.constrained(inputs, params["in_shardings"])
                return _compat.constrained(jax.jit(body)(inputs, states), params["out_shardings"])
            case _compat.remat_p:
                body = self._function(_compat.closed(params["jaxpr"]), place, depth, "checkpoint")
                remat = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
                return remat(inputs, states)
            case _compat.cond_p:
                branches = [
                    self._function(branch, (*place, number), depth, f"branch_{number}", nested=True)
                    for number, branch in enumerate(params["branches"])
                ]
                return lax.switch(inputs[0], branches, inputs[1:], states)
            case _compat.scan_p:
                return self._scan(eqn, inputs, place, depth, states)
            case _ if eqn.primitive.name == "shard_map":
                return self._shard_map(eqn, inputs, place, depth, states)
        raise AssertionError(f"no sites are looked for inside {eqn.primitive}")  # discover() seals them

    def _function(
        self, jaxpr: Any, place: Place, depth: int, name: str, *, nested: bool = False
    ) -> Callable[[list[Any], States], list[Any]]:
        def body(arguments: list[Any], states: States) -> list[Any]:
            return self.closed(jaxpr, arguments, place, depth, _under(states, place) if nested else states)

        body.__name__ = body.__qualname__ = name
        return body

    def _scan(self, eqn: _compat.JaxprEqn, inputs: list[Any], place: Place, depth: int, states: States) -> list[Any]:
        params = eqn.params
        consts, carries = _compat.scan_arity(params)
        fixed, carry, sliced = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]
        length = params["length"]
        stacked = {p: s for p, s in states.items() if self.loops[p][depth].instances}
        shared = {p: s for p, s in states.items() if p not in stacked}
        # One memory for all steps; but each step draws with a key of its own.
        keys = {p: [_keys_of_steps(leaf, length) for leaf in jax.tree.leaves(s)] for p, s in shared.items()}

        def body(
            carry: list[Any], step: tuple[list[Any], States, dict[Place, list[Any]]]
        ) -> tuple[list[Any], list[Any]]:
            arguments, own, own_keys = step
            now = {p: _with_keys(state, own_keys[p]) for p, state in shared.items()}
            results = self.closed(params["jaxpr"], [*fixed, *carry, *arguments], place, depth + 1, {**own, **now})
            return results[:carries], results[carries:]

        final, outputs = lax.scan(
            body,
            carry,
            (sliced, stacked, keys),
            length=length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*final, *outputs]

    def _shard_map(
        self, eqn: _compat.JaxprEqn, inputs: list[Any], place: Place, depth: int, states: States
    ) -> list[Any]:
        """A memory that devices share is whole on each; one for each device is cut up on its leading axes."""
        params = eqn.params
        width = len(_compat.new_mesh_axes(params))
        axes = {p: self.loops[p][depth : depth + width] for p in states}
        own = {p: PartitionSpec(*(axis.mesh_axis for axis in axes[p] if axis.instances)) for p in states}
        specs = {p: jax.tree.map(lambda _, p=p: own[p], state) for p, state in states.items()}

        def body(arguments: list[Any], states: States) -> list[Any]:
            mine = {p: jax.tree.map(lambda leaf, p=p: _of_device(leaf, axes[p]), state) for p, state in states.items()}
            return self.closed(_compat.closed(params["jaxpr"]), arguments, place, depth + width, mine)

        mapped = _compat.shard_map_like(params, body, (list(params["in_specs"]), specs))
        return mapped(inputs, states)


def _under(states: States, place: Place) -> States:
    return {p: state for p, state in states.items() if p[: len(place)] == place}


def _of_device(leaf: jax.Array, axes: tuple[Loop, ...]) -> jax.Array:
    """Return a device's own part of a leaf; where devices share a key, each draws with one made from it."""
    mine = leaf.reshape(leaf.shape[sum(axis.instances for axis in axes) :])
    if _compat.is_key(mine):
        for axis in axes:
            if axis.sharded and not axis.instances:
                device = lax.axis_index(axis.mesh_axis)
                mine = jax.vmap(jax.random.fold_in, (0, None))(mine.reshape(-1), device).reshape(mine.shape)
    return mine


def _keys_of_steps(leaf: jax.Array, length: int) -> jax.Array | None:
    return split_keys(leaf, length) if _compat.is_key(leaf) else None


def _with_keys(state: State, keys: list[jax.Array | None]) -> State:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [b if k is None else k for b, k in zip(leaves, keys, strict=True)])
