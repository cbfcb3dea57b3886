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


def sampled(structure: Structure, key: jax.Array, budget: float, ratio: float, previous: Sample | None) -> Sample:
    """Return two draws.

    Args:
      structure: The structure.
      key: Typed PRNG key.
      budget: How many units there may be on the average.
      ratio: Between capacities.
      previous: The sample before, whose capacities are kept unless they are far off.

    Raises:
      ValueError: As `Subnetwork.sample`.
    """
    found = _checked(structure, budget)
    draws = jax.device_get(_draws(structure.probabilities, key))
    masks = {name: _not_empty(draws[name], s) for name, s in found.items()}
    before = previous.first.capacities if previous is not None else {}
    capacities = {
        name: capacity(
            len(s),
            ratio,
            float(s.sum()),
            float((s * (1 - s)).sum()),
            int(masks[name].sum(axis=1).max()),
            before.get(name),
        )
        for name, s in found.items()
    }
    of = lambda masks, at: {name: mask[at] for name, mask in masks.items()}
    return Sample(*(chosen_of(of(masks, at), capacities, of(draws, at)) for at in range(2)))


def _not_empty(draws: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return draws `[2, units]` with the most probable unit where there is none."""
    empty = ~draws.any(axis=1, keepdims=True)
    return draws | (empty & (np.arange(len(s)) == s.argmax()))


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
    every, whole = sum(s.size for s in found.values()), sum(float(s.sum()) for s in found.values())
    if not len(found) <= budget <= every * (1 + 1e-6):
        raise ValueError(
            f"The budget at step {int(structure.step)} is {budget:g} units, of {every} in {len(found)} groups: it must "
            "leave at least one for each group, and is at most all of them."
        )
    if whole > budget * (1 + 1e-4) + 1e-3:
        raise ValueError(
            f"Probabilities add up to {whole:g}, above the budget of {budget:g}. Was the structure of another budget "
            "restored? update() brings it within this one."
        )
    return found
