"""Which entries of weights are kept: how many of each, and which these are."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from msbp_jax import _checks

type Weights = Mapping[str, np.ndarray]  # by path, stacked layers flattened: [layers, m, n]


def counts(shapes: Mapping[str, tuple[int, int, int]], density: float, scope: str) -> dict[str, int]:
    """Return how many entries a layer keeps of each weight, where that follows from its sizes.

    `"layer"`: the share `density` of each. `"erdos_renyi"`: in proportion to `(m + n) / (m n)`, so that the whole has
    that share, and none more than all of its entries.

    Args:
      shapes: `(layers, m, n)` of each weight, by path.
      density: Share of the entries that is kept.
      scope: `"layer"` or `"erdos_renyi"`.
    """
    sizes = {name: m * n for name, (_, m, n) in shapes.items()}
    if scope == "layer":
        return {name: round(density * size) for name, size in sizes.items()}
    share = {name: (m + n) / (m * n) for name, (_, m, n) in shapes.items()}
    whole = {name: layers * sizes[name] for name, (layers, _, _) in shapes.items()}
    full: set[str] = set()
    while True:
        left = density * sum(whole.values()) - sum(whole[name] for name in full)
        weighed = sum(share[name] * whole[name] for name in whole if name not in full)
        factor = left / weighed if weighed else 0.0
        over = {name for name in whole if name not in full and factor * share[name] > 1}
        if not over:
            break
        full |= over
    return {name: size if name in full else round(factor * share[name] * size) for name, size in sizes.items()}


def in_blocks(weights: Weights, block: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the norm of each block of each weight, `[layers, m / height, n / width]`.

    Raises:
      ValueError: A weight cannot be cut into such blocks.
    """
    found = {}
    for name, weight in weights.items():
        layers, m, n = weight.shape
        if m % block[0] or n % block[1]:
            raise ValueError(
                f"{name}, {m} x {n}, cannot be cut into blocks of {block[0]} x {block[1]}. Leave it out by include=."
            )
        cut = weight.reshape(layers, m // block[0], block[0], n // block[1], block[1])
        found[name] = np.sqrt(np.square(cut).sum(axis=(2, 4)))
    return found


def of_blocks(masks: Mapping[str, np.ndarray], block: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return masks of entries, from those of blocks."""
    return {name: mask.repeat(block[0], axis=1).repeat(block[1], axis=2) for name, mask in masks.items()}


def largest(
    weights: Weights, kept: Mapping[str, int], among: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Return masks of the entries with the largest magnitudes in each layer, ties to the first.

    Args:
      weights: By path.
      kept: How many entries a layer keeps of each.
      among: Masks of those that may be kept; None for all.
    """
    return {name: _best(scores, kept[name]) for name, scores in _magnitudes(weights, among).items()}


def largest_of_all(
    weights: Weights, density: float, among: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Return masks of the entries with the largest magnitudes of all weights together, ties to the first.

    Args:
      weights: By path.
      density: Share of all entries that is kept.
      among: Masks of those that may be kept; None for all.
    """
    flat = np.concatenate([scores.ravel() for scores in _magnitudes(weights, among).values()])
    mask = _best(flat.reshape(1, 1, -1), round(density * flat.size)).ravel()
    ends = np.cumsum([weight.size for weight in weights.values()])
    parts = np.split(mask, ends[:-1])
    return {name: part.reshape(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def drawn(weights: Weights, kept: Mapping[str, int], key: jax.Array) -> dict[str, np.ndarray]:
    """Return masks of entries drawn alike, whatever their values."""
    keys = jax.random.split(key, max(1, len(weights)))
    noise = {n: np.asarray(jax.random.uniform(k, w.shape)) for k, (n, w) in zip(keys, weights.items(), strict=False)}
    return {name: _best(noise[name], kept[name]) for name in weights}


def _magnitudes(weights: Weights, among: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Return magnitudes, and below all of them what may not be kept: an entry that is 0 is more than none."""
    found = {name: np.abs(weight) for name, weight in weights.items()}
    return found if among is None else {name: np.where(among[name], found[name], -1) for name in found}


def _best(scores: np.ndarray, kept: int) -> np.ndarray:
    layers = scores.reshape(len(scores), -1)
    order = np.argsort(-layers, axis=1, kind="stable")[:, :kept]
    mask = np.zeros(layers.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask.reshape(scores.shape)


def check_choice(density: object, method: object, scope: object, key: jax.Array | None) -> float:
    """Return the density, or raise for what is no way to choose.

    Raises:
      TypeError: `density` is no number.
      ValueError: A value out of range, an unknown name, or a missing key.
    """
    share = _checks.fraction("density", density, zero=False, meaning="share of the entries of a weight that is kept")
    if method not in ("magnitude", "random"):
        raise ValueError(f'method must be "magnitude" or "random", got {method!r}.')
    if scope not in ("layer", "global", "erdos_renyi"):
        raise ValueError(f'scope must be "layer", "global" or "erdos_renyi", got {scope!r}.')
    if method == "random" and scope == "global":
        raise ValueError('Entries drawn at random have no order among layers: with method="random", scope is "layer" or'
                         ' "erdos_renyi".')  # fmt: skip
    if method == "random" and key is None:
        raise ValueError('method="random" needs a key: prune(..., key=jax.random.key(0)).')
    if method == "magnitude" and key is not None:
        raise ValueError('method="magnitude" draws nothing, and takes no key.')
    return share
