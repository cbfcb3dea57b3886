"""Updates of the units that were drawn alone: parameters, and whatever an optimizer holds in their shapes."""

from __future__ import annotations

from typing import Any

import jax
import optax

from msbp_jax.subnetworks._narrow import Chosen, Places, places_of, put, take
from msbp_jax.subnetworks._units import Units


def update_kept(
    tx: optax.GradientTransformation, units: Units, grads: Any, opt_state: Any, params: Any, chosen: Chosen
) -> tuple[Any, Any]:
    """Return parameters and the optimizer's state after a step in which only the units of a sample take part.

    The momentum of all others stands still, where a whole step would let it decay and move them on.

    Args:
      tx: The optimizer; `opt_state` is that of the whole parameters.
      units: Where units are.
      grads: As narrow as the sample.
      opt_state: Its state.
      params: Whole parameters.
      chosen: The sample.
    """
    of_params = places_of(units, params)
    _check_state(opt_state)
    of_state = optax.tree_utils.tree_map_params(
        tx,
        _in_place,
        opt_state,
        of_params,
        jax.tree.map(_Shape, params),
        transform_non_params=lambda _: Places(()),
        is_leaf=_is_masked,
    )
    narrowed = lambda leaf, where: take(leaf, where, chosen)
    whole = lambda leaf, new, where: put(leaf, new, where, chosen)
    slices = jax.tree.map(narrowed, params, of_params)
    updates, state = tx.update(grads, jax.tree.map(narrowed, opt_state, of_state), slices)
    slices = optax.apply_updates(slices, updates)
    return jax.tree.map(whole, params, slices, of_params), jax.tree.map(whole, opt_state, state, of_state)


class _Shape:
    """The shape of a parameter; a leaf of a pytree itself."""

    def __init__(self, leaf: Any) -> None:
        self.shape = tuple(leaf.shape)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _in_place(leaf: Any, where: Places, of: _Shape) -> Any:
    if _is_masked(leaf):
        return leaf
    if where.places and tuple(leaf.shape) != of.shape:
        raise ValueError(
            f"update_kept narrows what an optimizer holds in the shapes of the parameters, and this one holds "
            f"{leaf.shape} for a parameter of shape {of.shape}, as Adafactor does. Use tx.update with whole gradients."
        )
    return where


def _check_state(opt_state: Any) -> None:
    accumulates = lambda node: isinstance(node, optax.MultiStepsState)
    if any(map(accumulates, jax.tree.leaves(opt_state, is_leaf=accumulates))):
        raise ValueError(
            "optax.MultiSteps adds up gradients of several samples, whose units differ. Use tx.update with whole "
            "gradients."
        )
