"""How state leaves the backward pass: as logs of the custom rules, one key for each use of each site.

A rule cannot return its new state as a cotangent without losing it in untaken branches and unused layers; it logs it
under a key instead, and whoever pulls back with logs collects it. `Tracker.mark` gives every leaf of a memory a mark
before the loss runs; a rule names its log after the marks of its state; `Tracker.collect` puts what was logged back in
the leaves' places. Logs that several uses left for one leaf (two calls with one memory, time steps, a vmap around the
model) are averaged; PRNG keys, which cannot be, are taken from the last use. A leaf nobody logged keeps its value.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.sparsifiers._base import State


class LogKey(str):
    """Name of one use's log, a string since JAX sorts keys; the text holds all that is needed to read the log."""

    __slots__ = ("axes", "leaves", "ranks")
    leaves: tuple[int, ...]  # which leaves of the memory the logged ones replace
    ranks: tuple[int, ...]  # rank of each logged leaf at the site itself
    axes: str  # one letter for each enclosing scan, outermost first: "i" an instance each, "s" a step each

    def __new__(cls, use: int, leaves: tuple[int, ...], ranks: tuple[int, ...], axes: str) -> LogKey:
        """Make the key of use number `use`."""
        key = super().__new__(cls, f"msbp_jax/{use:08d}/{leaves}/{ranks}/{axes}")
        key.leaves, key.ranks, key.axes = leaves, ranks, axes
        return key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marked:
    """A leaf of a memory, marked so that its new value finds its way back; or an empty state, which has none."""

    value: jax.Array | tuple[()]
    place: int | None = dataclasses.field(metadata={"static": True})
    tracker: Tracker = dataclasses.field(metadata={"static": True})


class SiteLog(NamedTuple):
    """What a rule logs.

    Attributes:
      state: The leaves of the site's new state.
      extra: Whatever else the tracker's `observe` asks for.
    """

    state: list[jax.Array]
    extra: dict[str, jax.Array]


class Tracker:
    """Follows the leaves of one memory through one differentiation.

    Args:
      observe: "" in training; "sparse" or "dense" make the rules log the weight's gradient too, the second with a dense
        backward (`msbp.diagnose`).
    """

    def __init__(self, observe: str = "") -> None:
        self.observe = observe
        self.sites: dict[LogKey, str] = {}
        self._uses = itertools.count()

    def mark(self, memory: Any) -> Any:
        """Return the memory with every leaf and every empty state marked."""
        places = itertools.count()

        def marked(leaf: Any) -> Marked:
            return Marked(leaf, None if _is_empty(leaf) else next(places), self)

        return jax.tree.map(marked, memory, is_leaf=_is_empty)

    def key(self, site: str, leaves: tuple[int, ...], ranks: tuple[int, ...], axes: str) -> LogKey:
        """Return a key for one more use of the leaves, by the site of that name."""
        key = LogKey(next(self._uses), leaves, ranks, axes)
        self.sites[key] = site
        return key

    def collect(self, memory: Any, logs: dict[Any, Any]) -> Any:
        """Return the memory with what was logged in its place."""
        leaves, structure = jax.tree.flatten(memory)
        found: dict[int, list[_Total]] = {}
        for key, log in logs.items():
            if isinstance(key, LogKey):
                for position, place in enumerate(key.leaves):
                    total = _total(log, position, leaves[place], key)
                    found.setdefault(place, []).append(total)
        for place, totals in found.items():
            leaves[place] = _merged(leaves[place], totals)
        return jax.tree.unflatten(structure, leaves)


def unwrap(state: State) -> tuple[State, Tracker | None, tuple[int, ...]]:
    """Return a site's state without marks, who follows it (None under plain `jax.grad`), and its leaves' places."""
    leaves, structure = jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, Marked))
    if not leaves or not all(isinstance(leaf, Marked) for leaf in leaves):
        return state, None, ()
    values = jax.tree.unflatten(structure, [leaf.value for leaf in leaves])
    return values, leaves[0].tracker, tuple(leaf.place for leaf in leaves if leaf.place is not None)


def branches_of(log: Any) -> list[tuple[SiteLog, jax.Array]]:
    """Return a rule's log for every branch of the conds around it, each with whether it ran, over its leading axes."""
    branched = _compat.split_branch_log(log)
    if branched is None:
        return [(log, jnp.ones((), bool))]
    index, branches = branched
    flat: list[tuple[SiteLog, jax.Array]] = []
    for number, branch in enumerate(branches):
        if branch is not None:
            flat.extend((inner, _and(index == number, ran)) for inner, ran in branches_of(branch))
    return flat


def _and(outer: jax.Array, inner: jax.Array) -> jax.Array:
    """Elementwise and of masks over leading axes; the one of lower rank lacks the inner loops' axes."""
    rank = max(outer.ndim, inner.ndim)
    return _spread(outer, rank) & _spread(inner, rank)


def _spread(mask: jax.Array, rank: int) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (rank - mask.ndim))


class _Total(NamedTuple):
    """New values of one leaf: their sum (a key: the last one) and how many there are, by instance."""

    value: jax.Array
    count: jax.Array


def _total(log: Any, position: int, old: jax.Array, key: LogKey) -> _Total:
    """Take the axes out of a log that its leaf does not have: time steps, and vmaps around the whole model."""
    totals = []
    for site_log, ran in branches_of(log):
        new = site_log.state[position]
        own = key.ranks[position]
        mapped = old.ndim - own - key.axes.count("i")
        around = new.ndim - own - len(key.axes) - mapped
        letters = "s" * around + "i" * mapped + key.axes
        ran = jnp.broadcast_to(_spread(ran, len(letters)), new.shape[: len(letters)])
        totals.append(_over_steps(new, ran, tuple(i for i, letter in enumerate(letters) if letter == "s")))
    return _added(totals)


def _over_steps(new: jax.Array, ran: jax.Array, steps: tuple[int, ...]) -> _Total:
    if _averages(new):
        kept = jnp.where(_spread(ran, new.ndim), new, jnp.zeros((), new.dtype))
        return _Total(kept.sum(axis=steps, dtype=new.dtype), ran.sum(axis=steps, dtype=jnp.int32))
    for axis in reversed(steps):  # a key: the last one that ran
        length = new.shape[axis]
        last = length - 1 - jnp.argmax(jnp.flip(ran, axis), axis=axis)
        chosen = [jax.lax.index_in_dim(new, i, axis, keepdims=False) for i in range(length)]
        new, ran = _select(chosen, last), ran.any(axis=axis)
    return _Total(new, ran.astype(jnp.int32))


def _select(choices: list[jax.Array], which: jax.Array) -> jax.Array:
    value = choices[0]
    for i, choice in enumerate(choices[1:], 1):
        value = jnp.where(_spread(which == i, value.ndim), choice, value)
    return value


def _added(totals: list[_Total]) -> _Total:
    value, count = totals[0]
    for other, more in totals[1:]:
        if _averages(value):
            value = value + other
        else:
            value = jnp.where(_spread(more, value.ndim) > 0, other, value)
        count = count + more
    return _Total(value, count)


def _merged(old: jax.Array, totals: list[_Total]) -> jax.Array:
    value, count = _added(totals)
    count = _spread(count, old.ndim)
    if _averages(old):
        value = value / jnp.maximum(count, 1).astype(old.dtype)
    return jnp.where(count > 0, value, old)


def _is_empty(node: Any) -> bool:
    return isinstance(node, tuple) and not node


def _averages(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
