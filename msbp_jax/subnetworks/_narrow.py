"""Narrow arrays: the slices of the units that were drawn, taken out of a pytree and put back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from msbp_jax._checks import path_name
from msbp_jax.subnetworks._units import Place, Units, is_variables, places


class Chosen(struct.PyTreeNode):
    """The units of a sample, in places as many as a program was compiled for.

    Attributes:
      index: By group `[capacity]`, int32: the unit at each place, ascending, and then others that fill it up.
      alive: By group `[capacity]`: whether the unit is of the sample.
      drawn: By group `[capacity]`: whether it was drawn. Where no unit of a group was, the most probable one is of the
        sample all the same, as a layer without units is none.
    """

    index: dict[str, Int[Array, " capacity"]]
    alive: dict[str, Bool[Array, " capacity"]]
    drawn: dict[str, Bool[Array, " capacity"]]

    @classmethod
    def of(cls, masks: dict[str, np.ndarray]) -> Chosen:
        """Return the units of masks, by group, True where one is kept; for a choice that was made in another way."""
        return chosen_of(masks, {name: int(np.sum(mask)) for name, mask in masks.items()})

    @property
    def capacities(self) -> dict[str, int]:
        """How many places each group has."""
        return {name: int(index.shape[-1]) for name, index in self.index.items()}

    def counts(self) -> dict[str, int]:
        """Return how many units each group has; of arrays that are not traced."""
        return {name: int(np.sum(alive)) for name, alive in self.alive.items()}

    def masks(self, units: Units, *, drawn: bool = False) -> dict[str, Bool[Array, " units"]]:
        """Return a mask of all units of each group, True where one is of the sample, or was drawn."""
        which = self.drawn if drawn else self.alive
        return {
            name: jnp.zeros(units[name].size, bool).at[index].set(which[name], unique_indices=True)
            for name, index in self.index.items()
        }


def chosen_of(
    masks: dict[str, np.ndarray], capacities: dict[str, int], drawn: dict[str, np.ndarray] | None = None
) -> Chosen:
    """Return the units of masks, True where one is of the sample, in places of these numbers.

    Args:
      masks: By group.
      capacities: By group.
      drawn: Masks of what was drawn, where that is another.
    """
    index = {n: np.argsort(~mask, kind="stable")[: capacities[n]].astype(np.int32) for n, mask in masks.items()}
    at = lambda masks: {name: jnp.asarray(masks[name][places]) for name, places in index.items()}
    return Chosen(jax.tree.map(jnp.asarray, index), at(masks), at(masks if drawn is None else drawn))


class Places:
    """Where one leaf has units; a leaf of a pytree itself."""

    def __init__(self, places: tuple[Place, ...]) -> None:
        self.places = places


def places_of(units: Units, tree: Any) -> Any:
    """Return a pytree like another with a `Places` for each leaf."""
    within = 1 if is_variables(tree) else 0
    of = lambda path, leaf: Places(places(units, path_name(path[within:]), leaf))
    return jax.tree_util.tree_map_with_path(of, tree)


def narrow(units: Units, tree: Any, chosen: Chosen) -> Any:
    """Return a pytree with the slices of a sample; those that fill up are 0, and so is their gradient.

    Differentiable: a gradient goes back to where its slice came from, and is 0 elsewhere.

    Args:
      units: Where units are.
      tree: Parameters, a part of them, variables, or gradients of their shapes.
      chosen: The sample.
    """
    return jax.tree.map(lambda leaf, where: take(leaf, where, chosen), tree, places_of(units, tree))


def take(leaf: Any, where: Places, chosen: Chosen) -> Any:
    """Return the slices of one leaf."""
    for group, axis, outer, inner in where.places:
        index = chosen.index[group]
        before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
        cut = leaf.reshape(*before, outer, leaf.shape[axis] // (outer * inner), inner, *after)
        taken = jnp.take(cut, index, axis=axis + 1, unique_indices=True, mode="clip")
        leaf = taken.reshape(*before, outer * len(index) * inner, *after)
    return _without_filling(leaf, where, chosen)


def cleared(units: Units, tree: Any, narrowed: Any, chosen: Chosen) -> Any:
    """Return slices with zeros where they fill up: the gradient there is none of a parameter's.

    Args:
      units: Where units are.
      tree: The whole.
      narrowed: Its slices.
      chosen: The sample.
    """
    clear = lambda new, where: _without_filling(new, where, chosen)
    return jax.tree.map(clear, narrowed, places_of(units, tree))


def _without_filling(new: Any, where: Places, chosen: Chosen) -> Any:
    """Return slices of one leaf with zeros for the units that fill a sample up."""
    for group, axis, outer, inner in where.places:
        alive = jnp.tile(chosen.alive[group].repeat(inner), outer)
        shape = (1,) * axis + (alive.size,) + (1,) * (new.ndim - axis - 1)
        new = jnp.where(jnp.broadcast_to(alive.reshape(shape), new.shape), new, jnp.zeros((), new.dtype))
    return new


def widen(units: Units, tree: Any, narrowed: Any, chosen: Chosen) -> Any:
    """Return a pytree with the slices of a sample replaced; all others, and those that fill up, stay.

    Args:
      units: Where units are.
      tree: The whole.
      narrowed: What `narrow` returns of such a tree, changed.
      chosen: The sample.
    """
    put_back = lambda leaf, new, where: put(leaf, new, where, chosen)
    return jax.tree.map(put_back, tree, narrowed, places_of(units, tree))


def put(leaf: Any, new: Any, where: Places, chosen: Chosen) -> Any:
    """Return one leaf with its slices replaced."""
    if not where.places:
        return new
    entries = [jnp.arange(length) for length in leaf.shape]
    for group, axis, outer, inner in where.places:
        index, alive = chosen.index[group], chosen.alive[group]
        units = leaf.shape[axis] // (outer * inner)
        beyond = outer * units + jnp.arange(len(index))  # dropped, and each another one
        unit = jnp.where(alive, index, beyond)[None, :, None]
        at = (jnp.arange(outer)[:, None, None] * units + unit) * inner + jnp.arange(inner)[None, None]
        entries[axis] = at.reshape(-1)
    last = max(place.axis for place in where.places)
    # Behind the last axis with units whole slices are copied.
    grid = tuple(at.reshape(-1, *(1 for _ in range(last - axis))) for axis, at in enumerate(entries[: last + 1]))
    return leaf.at[grid].set(new.astype(leaf.dtype), mode="drop", unique_indices=True)


def masked(units: Units, tree: Any, chosen: Chosen) -> Any:
    """Return the whole pytree with zeros in place of all units that are not of a sample."""
    return widen(units, jax.tree.map(jnp.zeros_like, tree), narrow(units, tree, chosen), chosen)
