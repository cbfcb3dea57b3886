"""Samples: two draws of units, in capacities that programs are compiled for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from msbp_jax.subnetworks import _structure
from msbp_jax.subnetworks._narrow import Chosen, chosen_of
from msbp_jax.subnetworks._rungs import capacity
from msbp_jax.subnetworks._structure import Structure


class Sample(struct.PyTreeNode):
    """Two draws of units, one independent of the other, in equal capacities.

    Attributes:
      first: Serves the weights, and updates batch statistics.
      second: What the loss of the first is compared with.
    """

    first: Chosen
    second: Chosen


def sampled(structure: Structure, key: jax.Array, budget: float, ratio: float) -> Sample:
    """Return two draws.

    Args:
      structure: The structure.
      key: Typed PRNG key.
      budget: How many units there may be on the average.
      ratio: Between capacities.

    Raises:
      ValueError: As `Subnetwork.sample`.
    """
    found = _checked(structure, budget)
    masks = jax.device_get(_draws(structure.probabilities, key))
    capacities = {
        name: capacity(len(s), ratio, float(s.sum()), float((s * (1 - s)).sum()), int(masks[name].sum(axis=1).max()))
        for name, s in found.items()
    }
    one = lambda at: chosen_of({name: mask[at] for name, mask in masks.items()}, capacities)
    return Sample(one(0), one(1))


@jax.jit
def _draws(probabilities: Any, key: jax.Array) -> Any:
    first, second = (_structure.draw(probabilities, k) for k in jax.random.split(key))
    return {name: jnp.stack([first[name], second[name]]) for name in first}


def _checked(structure: Structure, budget: float) -> dict[str, np.ndarray]:
    """Return probabilities as NumPy arrays, or raise for such as no update returns."""
    found = {name: np.asarray(s) for name, s in structure.probabilities.items()}
    for name, s in found.items():
        if not np.isfinite(s).all():
            raise ValueError(f"Probabilities of {name!r} are not finite: the loss of an earlier step was not.")
        if s.min() < 0 or s.max() > 1:
            raise ValueError(f"Probabilities of {name!r} must lie in [0, 1], got {s.min():g} to {s.max():g}.")
    whole = sum(float(s.sum()) for s in found.values())
    if whole > budget * (1 + 1e-4) + 1e-3:
        raise ValueError(
            f"Probabilities add up to {whole:g}, above the budget of {budget:g}. Was the structure of another budget "
            "restored? update() brings it within this one."
        )
    return found
