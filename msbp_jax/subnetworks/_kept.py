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
    nowhere = lambda _: Places(())
    in_place = lambda leaf, where: where
    of_state = optax.tree_utils.tree_map_params(tx, in_place, opt_state, of_params, transform_non_params=nowhere)
    narrowed = lambda leaf, where: take(leaf, where, chosen)
    whole = lambda leaf, new, where: put(leaf, new, where, chosen)
    slices = jax.tree.map(narrowed, params, of_params)
    updates, state = tx.update(grads, jax.tree.map(narrowed, opt_state, of_state), slices)
    slices = optax.apply_updates(slices, updates)
    return jax.tree.map(whole, params, slices, of_params), jax.tree.map(whole, opt_state, state, of_state)
