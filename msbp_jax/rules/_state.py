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

type Mesh = tuple[tuple[int, int], ...]


class LogKey(str):
    """Name of one use's log, a string since JAX sorts keys; the text holds all that is needed to read the log."""

    __slots__ = ("axes", "leaves", "mesh", "ranks")
    leaves: tuple[int, ...]  # which leaves of the memory the logged ones replace
    ranks: tuple[int, ...]  # rank of each logged leaf at the site itself
    axes: str  # one letter for each loop around it, outermost first: "i" an instance each, "s" a step each
    mesh: Mesh  # which of the loops are axes of the devices of a shard_map, with their sizes

    def __new__(cls, use: int, leaves: tuple[int, ...], ranks: tuple[int, ...], axes: str, mesh: Mesh) -> LogKey:
        """Make the key of use number `use`."""
        key = super().__new__(cls, f"msbp_jax/{use:08d}/{leaves}/{ranks}/{axes}/{mesh}")
        key.leaves, key.ranks, key.axes, key.mesh = leaves, ranks, axes, mesh
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
      state: The leaves of the site's new state, as `to_log` makes them.
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
        self.marks = 0
        self._uses = itertools.count()

    def mark(self, memory: Any) -> Any:
        """Return the memory with every leaf and every empty state marked."""
        places = itertools.count()

        def marked(leaf: Any) -> Marked:
            self.marks += 1
            return Marked(leaf, None if _is_empty(leaf) else next(places), self)

        return jax.tree.map(marked, memory, is_leaf=_is_empty)

    def key(self, site: str, leaves: tuple[int, ...], ranks: tuple[int, ...], axes: str, mesh: Mesh = ()) -> LogKey:
        """Return a key for one more use of the leaves, by the site of that name."""
        key = LogKey(next(self._uses), leaves, ranks, axes, mesh)
        self.sites[key] = site
        return key

    def collect(self, memory: Any, logs: dict[Any, Any]) -> Any:
        """Return the memory with what was logged in its place."""
        leaves, structure = jax.tree.flatten(memory)
        found: dict[int, list[tuple[LogKey, int, Any]]] = {}
        for key, log in logs.items():
            if isinstance(key, LogKey):
                for position, place in enumerate(key.leaves):
                    found.setdefault(place, []).append((key, position, log))
        for place, uses in found.items():
            leaves[place] = _from_log(_collected(to_log(leaves[place]), uses, averages(leaves[place])), leaves[place])
        return jax.tree.unflatten(structure, leaves)


def _collected(old: jax.Array, uses: list[tuple[LogKey, int, Any]], averages: bool) -> jax.Array:
    """Return the new value of a leaf from everything that was logged for it."""
    key, position, log = uses[0]
    plain = len(uses) == 1 and isinstance(log, SiteLog) and not key.mesh and "i" not in key.axes
    if plain and log.state[position].shape == old.shape:
        return log.state[position]  # one use that always runs: nothing to be averaged or chosen
    totals = [_total(log, position, old, key, averages) for key, position, log in uses]
    return _merged(old, totals, averages)


def to_log(leaf: jax.Array) -> jax.Array:
    """Return what is logged for a leaf: itself if it is floating, else its bits, 16 to a float32.

    A branch of a `cond` that was not taken logs zeros, and JAX makes those of keys and integers in another type.
    """
    if averages(leaf):
        return leaf
    if _compat.is_key(leaf):
        leaf = jax.random.key_data(leaf)
    wide = leaf.astype(jnp.int32) if leaf.dtype.itemsize == 1 else leaf
    return jax.lax.bitcast_convert_type(wide, jnp.uint16).astype(jnp.float32)


def logged_rank(leaf: jax.Array) -> int:
    """Return the rank of `to_log(leaf)`."""
    return (
        jax.eval_shape(to_log, jax.ShapeDtypeStruct((), leaf.dtype)).ndim + leaf.ndim
        if not averages(leaf)
        else leaf.ndim
    )


def _from_log(logged: jax.Array, like: jax.Array) -> jax.Array:
    if averages(like):
        return logged
    if _compat.is_key(like):
        data = jax.lax.bitcast_convert_type(logged.astype(jnp.uint16), jax.random.key_data(like).dtype)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    wide = jnp.dtype(jnp.int32) if like.dtype.itemsize == 1 else like.dtype
    return jax.lax.bitcast_convert_type(logged.astype(jnp.uint16), wide).astype(like.dtype)


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
    """New values of one leaf: their sum (not a number: the last one) and how many there are, by instance."""

    value: jax.Array
    uses: jax.Array


def _total(log: Any, position: int, old: jax.Array, key: LogKey, averages: bool) -> _Total:
    """Take the axes out of a log that its leaf does not have: time steps, and vmaps around the whole model."""
    totals = []
    for site_log, ran in branches_of(log):
        new = _by_device(site_log.state[position], key, key.ranks[position])
        ran = _by_device(ran, key, 0) if ran.ndim else ran
        scans, own, instances = len(key.axes), key.ranks[position], key.axes.count("i")
        mapped = old.shape[: old.ndim - own - instances]
        letters = key.axes + _letters(new.shape[scans : new.ndim - own], mapped)
        ran = jnp.broadcast_to(_spread(ran, len(letters)), new.shape[: len(letters)])
        total = _over_steps(new, ran, tuple(i for i, letter in enumerate(letters) if letter == "s"), averages)
        # A log has the scans' axes before those of vmap; a memory that is mapped itself has them behind.
        totals.append(
            _Total(*(jnp.moveaxis(part, range(instances), _behind(len(mapped), instances)) for part in total))
        )
    return _added(totals, averages)


def _by_device(log: jax.Array, key: LogKey, own: int) -> jax.Array:
    """Give the devices of a `shard_map`, whose logs come strung together on one axis, an axis for each of theirs."""
    if not key.mesh:
        return log
    at, sizes = key.mesh[0][0], [size for _, size in key.mesh]
    each = log.shape[at] // math.prod(sizes)
    inner = len(key.axes) - at - len(sizes)  # scans within the shard_map
    alone = own + inner == 0 and each == 1  # a device logged a scalar
    return log.reshape((*log.shape[:at], *sizes, *(() if alone else (each,)), *log.shape[at + 1 :]))


def _letters(around: tuple[int, ...], mapped: tuple[int, ...]) -> str:
    """Say of each vmap around a site whether its memory is mapped by it ("i"), going by the sizes, or shared ("s")."""
    wanted = list(mapped)
    return "".join("i" if wanted and size == wanted[0] and wanted.pop(0) else "s" for size in around)


def _behind(mapped: int, instances: int) -> range:
    return range(mapped, mapped + instances)


def _over_steps(new: jax.Array, ran: jax.Array, steps: tuple[int, ...], averages: bool) -> _Total:
    if averages:
        kept = jnp.where(_spread(ran, new.ndim), new, jnp.zeros((), new.dtype))
        return _Total(kept.sum(axis=steps, dtype=new.dtype), ran.sum(axis=steps, dtype=jnp.int32))
    for axis in reversed(steps):  # no numbers to be averaged: the last one that ran
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


def _added(totals: list[_Total], averages: bool) -> _Total:
    value, uses = totals[0]
    for other, more in totals[1:]:
        ran = _spread(more, value.ndim) > 0
        value = value + other if averages else jnp.where(ran, other, value)
        uses = uses + more
    return _Total(value, uses)


def _merged(old: jax.Array, totals: list[_Total], averages: bool) -> jax.Array:
    value, uses = _added(totals, averages)
    uses = _spread(uses, old.ndim)
    if averages:
        value = value / jnp.maximum(uses, 1).astype(old.dtype)
    return jnp.where(uses > 0, value, old)


def _is_empty(node: Any) -> bool:
    return isinstance(node, tuple) and not node


def averages(leaf: jax.Array) -> bool:
    """Whether new values of a leaf are averaged, and logged as they are: it holds numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
