"""A memory among the parameters, whose gradient is the new memory: what Flax's `TrainState` overwrites by itself.

Flax has a collection, `_overwrite_with_gradient`, for what the backward pass renews: its optimizer sees nothing of
it, and its "gradient" is its next value. Whatever else a program does to gradients happens to these too: they are
added up over microbatches, averaged over devices, divided by a loss scale. So each leaf of the memory travels as a
total and a weight, whose quotient none of that changes:

    float      total, weight   the value is their quotient
    integer    as a float      exact up to 2^24
    key        how many steps have drawn with it, from the key that it started from

Inside the loss they are a memory like any other, on `Passage`'s carriers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._checks import path_name
from msbp_jax.carriers._leaf import Carriers, collected
from msbp_jax.carriers._passage import Passage
from msbp_jax.sparsifiers._base import State
from msbp_jax.sparsifiers._keys import Kinds, bits_as_keys, keys_as_bits
from msbp_jax.sparsifiers._weighted import averages, quotient

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"  # Flax's name; its TrainState knows it
_PLACE = "msbp_memory"


class Carried:
    """A memory as it stands among parameters.

    Attributes:
      tree: By site, and by path within its state, the total and weight of each leaf.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree


def with_memory(params: Any, overwritten: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters and a memory at its start as one pytree.

    Args:
      params: Parameters.
      overwritten: What else Flax overwrites with its gradient.
      memory: As `init_memory` returns it.
    """
    no_draws = lambda leaf: jnp.zeros(leaf.shape, jnp.float32) if _compat.is_key(leaf) else _as_float(leaf)
    totals = jax.tree.map(no_draws, memory)
    travelling = {site: _travelling(_named(state)) for site, state in totals.items()}
    return {"params": params, OVERWRITE_WITH_GRADIENT: {**overwritten, _PLACE: travelling}}


def without_memory(variables: Any) -> tuple[Any, Carried | None]:
    """Return variables without the memory that `with_memory` put among them, and that memory, if there is one."""
    overwritten = variables.get(OVERWRITE_WITH_GRADIENT) if isinstance(variables, Mapping) else None
    if not isinstance(overwritten, Mapping) or _PLACE not in overwritten:
        return variables, None
    others = {name: tree for name, tree in overwritten.items() if name != _PLACE}
    rest = {name: tree for name, tree in variables.items() if name != OVERWRITE_WITH_GRADIENT}
    return {**rest, OVERWRITE_WITH_GRADIENT: others} if others else rest, Carried(overwritten[_PLACE])


def opened(carried: Carried, start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the memory as wrapped models take it inside a loss.

    Args:
      carried: What stood among the parameters.
      start: The memory at the start, of the sites that are reached; the others keep their state.

    Raises:
      ValueError: The state of a site is not the one that the plan gives it.
    """
    reached = {site: state for site, state in start.items() if site in carried.tree}
    for site, state in reached.items():
        _check_same(site, _named(state), carried.tree[site])
    bits, kinds = keys_as_bits(reached)
    carriers = _gate(kinds, dict(carried.tree), bits)
    return Passage(_arrived(jax.lax.stop_gradient(dict(carried.tree)), reached)).marked(carriers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(kinds: Kinds, tree: dict[str, Any], start: Any) -> Any:
    """Return carriers whose cotangent becomes the gradient of the memory; keys of `start` are bits."""
    return Passage(_arrived(tree, bits_as_keys(start, kinds))).carriers


def _gate_forward(kinds: Kinds, tree: dict[str, Any], start: Any) -> tuple[Any, Any]:
    return _gate(kinds, tree, start), (tree, start)


def _gate_backward(kinds: Kinds, residuals: tuple[Any, Any], cotangents: Any) -> tuple[dict[str, Any], None]:
    tree, start = residuals
    memory = _arrived(tree, bits_as_keys(start, kinds))
    leaves, structure = jax.tree.flatten(memory)
    given = Passage.of_sites([carriers for carriers in cotangents if carriers])
    renewed = [_renewed(leaf, carriers) for leaf, carriers in zip(leaves, given, strict=True)]
    gradient = dict(tree)
    for site, state in jax.tree.unflatten(structure, renewed).items():
        keys = [name for name, leaf in _named(memory[site]).items() if _compat.is_key(leaf)]
        totals = {
            name: leaf + _draws(tree[site][name]) if name in keys else leaf for name, leaf in _named(state).items()
        }
        gradient[site] = _travelling(totals)
    return gradient, None


_gate.defvjp(_gate_forward, _gate_backward)


def _renewed(leaf: jax.Array, carriers: Carriers) -> jax.Array:
    """Return the new value of a leaf as it travels; of a key, how many more steps have drawn with it."""
    if _compat.is_key(leaf):
        return (carriers[0] > 0).astype(jnp.float32)
    return _as_float(collected(leaf, None, carriers))


def _travelling(totals: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    return {name: {"total": total, "weight": jnp.ones((), jnp.float32)} for name, total in totals.items()}


def _as_float(leaf: jax.Array) -> jax.Array:
    return leaf if averages(leaf) else leaf.astype(jnp.float32)


def _arrived(tree: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the memory that travels, of the sites of `start`."""
    return {site: _state(tree[site], state) for site, state in start.items()}


def _state(travelling: Mapping[str, Any], start: State) -> State:
    def leaf(path: Any, at_start: jax.Array) -> jax.Array:
        pair = travelling[path_name(path)]
        if _compat.is_key(at_start):
            return _after(at_start, _draws(pair))
        if averages(at_start):
            return quotient(at_start, pair["total"], pair["weight"])
        number = quotient(at_start.astype(jnp.float32), pair["total"], pair["weight"])
        return jnp.round(number).astype(at_start.dtype)

    return jax.tree_util.tree_map_with_path(leaf, start)


def _draws(pair: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.round(quotient(jnp.zeros_like(pair["total"]), pair["total"], pair["weight"]))


def _after(key: jax.Array, draws: jax.Array) -> jax.Array:
    """Return the keys, of any shape, of the step after so many."""
    folded = jax.vmap(jax.random.fold_in)(key.reshape(-1), draws.reshape(-1).astype(jnp.uint32))
    return folded.reshape(key.shape)


def _named(state: State) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _check_same(site: str, leaves: Mapping[str, Any], travelling: Mapping[str, Any]) -> None:
    want = {name: leaf.shape for name, leaf in leaves.items()}
    have = {name: pair["total"].shape for name, pair in travelling.items()}
    if want != have:
        raise ValueError(
            f"The memory of site {site} among the parameters is of another model, plan or batch: expected leaves of "
            f"shapes {want}, got {have}. Make it anew with with_memory of the same wrapped model."
        )
