"""What has a state in a memory, under a name: the sites of a program, and the gradient that enters it."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._checks import is_array
from msbp_jax.carriers import plain
from msbp_jax.formats import Format
from msbp_jax.sparsifiers import Sparsifier
from msbp_jax.sparsifiers._base import State
from msbp_jax.sparsifiers._keys import fold_name, split_keys
from msbp_jax.sparsifiers._weighted import apply_weighted, averages
from msbp_jax.sparsifiers._where import abstract_norms


class Remembers(abc.ABC):
    """Something with a name and, unless it stays dense, a sparsifier.

    Attributes:
      name: In the memory.
      sparsifier: Its sparsifier; None where it stays dense.
    """

    name: str
    sparsifier: Sparsifier | None

    @property
    @abc.abstractmethod
    def cotangent(self) -> jax.ShapeDtypeStruct:
        """Shape `[rows, n]` and dtype of the gradient that the sparsifier sees."""

    @property
    @abc.abstractmethod
    def instances(self) -> tuple[int, ...]:
        """Leading axes of its state."""

    @property
    @abc.abstractmethod
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""

    @property
    def abstract_state(self) -> State:
        """Shapes and dtypes of the state."""
        assert self.sparsifier is not None
        state = _abstract_init(self.sparsifier, self.cotangent)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*self.instances, *leaf.shape), leaf.dtype), state)

    @property
    def weight_shapes(self) -> list[tuple[int, ...] | None]:
        """Shape of what each leaf of the state weighs in one use; None for leaves that are no numbers."""
        assert self.sparsifier is not None
        state, weight = _abstract_use(self.sparsifier, self.cotangent)
        return [
            (*self.instances, *leaf_weight.shape) if averages(leaf) else None
            for leaf, leaf_weight in zip(*map(jax.tree.leaves, (state, weight)), strict=True)
        ]

    def init(self, label: str) -> State:
        """Return the state at the start; PRNG keys in it differ by site, by instance, and by what was wrapped."""
        assert self.sparsifier is not None

        def spread(leaf: Any) -> jax.Array:
            leaf = jnp.asarray(leaf)
            if not _compat.is_key(leaf):
                return jnp.broadcast_to(leaf, (*self.instances, *leaf.shape))
            keys = split_keys(fold_name(leaf, f"{label}/{self.name}"), math.prod(self.instances))
            return keys.reshape(*self.instances, *leaf.shape)

        return jax.tree.map(spread, self.sparsifier.init(self.cotangent))


@functools.lru_cache(maxsize=1024)  # every call of a wrapped model checks its memory
def _abstract_init(sparsifier: Sparsifier, cotangent: jax.ShapeDtypeStruct) -> State:
    return jax.eval_shape(lambda: sparsifier.init(cotangent))


@functools.lru_cache(maxsize=1024)
def _abstract_use(sparsifier: Sparsifier, cotangent: jax.ShapeDtypeStruct) -> tuple[State, State]:
    """Return the state and what it weighs, in shapes."""
    state = _abstract_init(sparsifier, cotangent)
    seen = abstract_norms(sparsifier.wants, cotangent)
    use = lambda g, state, seen: apply_weighted(sparsifier, g, state, **seen).weight
    return state, jax.eval_shape(use, cotangent, state, seen)


def abstract_result(site: Remembers) -> Format:
    """Return what the sparsifier of a site makes, in shapes and dtypes."""
    assert site.sparsifier is not None
    return _abstract_result(site.sparsifier, site.cotangent)


@functools.lru_cache(maxsize=1024)
def _abstract_result(sparsifier: Sparsifier, aval: jax.ShapeDtypeStruct) -> Format:
    seen = abstract_norms(sparsifier.wants, aval)
    p: Format = jax.eval_shape(lambda u, seen: sparsifier.apply(u, sparsifier.init(aval), **seen), aval, seen)[0]
    return p


def init_memory(sites: Sequence[Remembers], label: str) -> dict[str, State]:
    """Return the memory of all that have a sparsifier at the start; `label` tells one model's keys from another's."""
    return {site.name: site.init(label) for site in sites if site.sparsifier is not None}


def check_memory(memory: Any, sites: Sequence[Remembers], parameters: Sequence[str] = ()) -> None:
    """Raise unless `memory` is of these sites; the paths of the parameters tell whether it is they that were passed.

    Raises:
      TypeError: It is not a mapping.
      ValueError: Sites are missing, or a site's state has another structure or other shapes. It may have more sites: a
        call that does not reach them leaves them as they are.
    """
    if not isinstance(memory, Mapping):
        raise TypeError(
            f"memory must be what init_memory returned, a mapping by site name, got {type(memory).__name__}."
        )
    sparse = {site.name: site for site in sites if site.sparsifier is not None}
    if missing := sorted(sparse.keys() - memory.keys()):
        swapped = set(map(str, memory)) & {path.split("/")[0] for path in parameters} - sparse.keys()
        raise ValueError(
            f"memory is not of this model and plan: it lacks the sites {missing}, and has "
            f"{sorted(map(str, memory)) or 'none'}. "
            + ("These are parameters: were params and memory swapped? " if swapped else "")
            + "Make it with init_memory of the same wrapped model, from a call that reaches all that is trained."
        )
    wanted, given = {name: site.abstract_state for name, site in sparse.items()}, plain(dict(memory))
    if what := _taken_for_states(wanted, given):
        raise ValueError(what)
    differences = [
        line
        for name, site in sparse.items()
        if not site.is_empty  # without rows, a memory by row may have any number of them
        for line in _differences(name, wanted[name], given[name])
    ]
    if differences:
        raise ValueError(
            "\n  ".join(["memory is of other shapes than this model, plan and batch:", *differences])
            + '\nIt comes from another model or plan or, with reduce="slot" or "local", from another batch size or '
            "number of devices: make it with init_memory of the same wrapped model and arguments of these shapes."
        )


def _taken_for_states(wanted: Mapping[str, State], given: Mapping[str, Any]) -> str:
    """Say what was passed instead of states of sparsifiers, where that can be seen; else ""."""
    states = {name: state for name, state in wanted.items() if hasattr(state, "_fields")}
    restored = [n for n, s in states.items() if isinstance(given[n], Mapping) and set(given[n]) == set(s._fields)]
    if restored:
        kind = type(states[restored[0]]).__name__
        return (
            f"memory of {', '.join(restored)} is a dict of the fields of {kind}, as a checkpoint is that was restored "
            "without a target. Restore it with one, as ocp.args.StandardRestore(model.init_memory(...)) does."
        )
    if arrays := [name for name in states if is_array(given[name])]:
        return (
            f"memory of {', '.join(arrays)} is an array, and no state of a sparsifier. Were params and memory swapped? "
            "The memory is what init_memory of the wrapped model returned."
        )
    return ""


def _differences(name: str, wanted: State, given: State) -> list[str]:
    """Say what differs between the state that a site needs and the one that it is given, a line each."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (wanted, given)]
    if structures[0] != structures[1]:
        return [f"memory of site {name} has another structure: expected {structures[0]}, got {structures[1]}."]
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True)
    return [
        f"memory of site {name} has shape {getattr(have, 'shape', None)} and dtype {getattr(have, 'dtype', None)}, "
        f"expected {want.shape} and {want.dtype}."
        for want, have in pairs
        if (want.shape, want.dtype) != (getattr(have, "shape", None), getattr(have, "dtype", None))
    ]
