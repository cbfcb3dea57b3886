"""Updates of the units that were drawn alone: parameters, and whatever an optimizer holds in their shapes."""

from __future__ import annotations

from typing import Any

import jax
import optax

from msbp_jax.subnetworks._narrow import Chosen, places_of, put, take
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
    where = places_of(units, params)
    narrowed = lambda leaf, spec: take(leaf, spec, chosen)
    state = optax.tree_utils.tree_map_params(tx, narrowed, opt_state, where)
    slices = jax.tree.map(narrowed, params, where)
    updates, state = tx.update(grads, state, slices)
    slices = optax.apply_updates(slices, updates)
    whole = lambda new, leaf, spec: put(leaf, new, spec, chosen)
    params = jax.tree.map(lambda leaf, new, spec: put(leaf, new, spec, chosen), params, slices, where)
    return params, optax.tree_utils.tree_map_params(tx, whole, state, opt_state, where)
