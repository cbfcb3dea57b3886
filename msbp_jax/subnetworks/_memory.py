"""The memory of a sparse backward, narrow with the layers that it belongs to."""

from __future__ import annotations

from typing import Any

import jax

from msbp_jax._checks import is_array
from msbp_jax.subnetworks._narrow import Places
from msbp_jax.subnetworks._units import Units, paths, places


def places_of_memory(units: Units, params: Any, memory: Any) -> Any:
    """Return a pytree like a memory with a `Places` for each leaf.

    What a site remembers has the features of its weight along its last axis, and so the units that these are. They are
    the last axis of the weight, as in Flax's kernels.

    Args:
      units: Where units are.
      params: The whole parameters.
      memory: By site, as `init_memory` returns it.
    """
    weights = dict(paths(params))

    def of(path: Any, leaf: Any) -> Places:
        name = str(getattr(path[0], "key", "")).split("#")[0] if path else ""
        weight = weights.get(name)
        if weight is None or not is_array(leaf) or not leaf.ndim or leaf.shape[-1] != weight.shape[-1]:
            return Places(())
        features = [place for place in places(units, name, weight) if place.axis == weight.ndim - 1]
        return Places(tuple(place._replace(axis=leaf.ndim - 1) for place in features))

    return jax.tree_util.tree_map_with_path(of, memory)
