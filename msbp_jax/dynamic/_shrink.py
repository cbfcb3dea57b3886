"""Patterns with fewer entries: the largest of those that there are, dense weights at the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax.dynamic._replace import followed
from msbp_jax.dynamic._schedule import leaves_of, patterns_of, with_leaves, with_new_patterns
from msbp_jax.weights import SPARSITY, Pattern, _choose, pattern_of, prune


class Patterns(NamedTuple):
    """Patterns by path of their weights.

    Attributes:
      old: Before; of dense weights there are none.
      new: After.
    """

    old: dict[str, Pattern]
    new: dict[str, Pattern]


def move(old: Pattern | None, new: Pattern) -> Callable[[Any], jax.Array]:
    """Return what becomes of values, or of moments like them, as entries of a pattern become those of another one.

    Args:
      old: None of a dense weight.
      new: Entries among those of `old`.
    """
    size = math.prod(new.matrix_shape)
    source = _places(new)
    if old is not None:
        number = np.full((len(source), size + 1), old.entries, np.int64)
        for row, places in zip(number, _places(old), strict=True):
            row[places] = np.arange(len(places))
        number[:, size] = old.entries  # padding comes from nowhere
        source = np.take_along_axis(number, source, axis=1)
    at = jnp.asarray(source.reshape(new.inputs.shape).astype(np.int32))
    return lambda leaf: _followed(at, jnp.asarray(leaf).reshape(*new.stacked, -1))


_followed = jax.jit(followed)


def _places(pattern: Pattern) -> np.ndarray:
    """Return where entries stand in a dense weight, `[layers, entries]`, one past its end for padding.

    On the host: lengths are new at every stage, and each would be compiled for.
    """
    m, n = pattern.matrix_shape
    starts, inputs = (np.asarray(array).reshape(-1, array.shape[-1]) for array in (pattern.starts, pattern.inputs))
    found = np.full(inputs.shape, m * n, np.int64)
    for places, begins, own in zip(found, starts, inputs, strict=True):
        places[: begins[-1]] = own[: begins[-1]].astype(np.int64) * n + np.repeat(np.arange(n), np.diff(begins))
    return found


def shrunk(
    variables: Mapping[str, Any], names: Sequence[str], density: float, options: Mapping[str, Any]
) -> tuple[dict[str, Any], Patterns]:
    """Return variables of which fewer entries are left, and the patterns before and after.

    Args:
      variables: Dense or sparse.
      names: Sparse weights that are pruned; of dense ones the options say.
      density: Share that is left of all entries that dense weights have.
      options: Of `prune`.

    Raises:
      ValueError: There are fewer entries than that, nothing would be kept of a weight, or one is not finite.
    """
    old = {name: pattern for name, pattern in patterns_of(variables).items() if name in names}
    if not old:
        pruned = prune(variables, density=density, **options)
        return pruned, Patterns({}, patterns_of(pruned))
    check_capacity(old, names, density, options["scope"])
    leaves = leaves_of(variables["params"])
    weights, masks = {}, {}
    for name, pattern in old.items():
        values = np.asarray(leaves[name], np.float64 if leaves[name].dtype == np.float64 else np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has entries that are not finite, of which none is larger than another.")
        places, (m, n) = _places(pattern), pattern.matrix_shape
        dense, mask = (np.zeros((len(places), m * n + 1), dtype) for dtype in (values.dtype, bool))
        np.put_along_axis(dense, places, values.reshape(places.shape), axis=1)
        np.put_along_axis(mask, places, True, axis=1)
        weights[name], masks[name] = (array[:, :-1].reshape(-1, m, n) for array in (dense, mask))
    kept = _chosen(weights, masks, {name: pattern.block for name, pattern in old.items()}, density, options["scope"])
    new = {}
    for name, pattern in old.items():
        mask = kept[name].reshape(*pattern.stacked, *pattern.shape)
        try:
            new[name] = pattern_of(
                mask, input_axes=pattern.input_axes, stacked=len(pattern.stacked), block=pattern.block
            )
        except ValueError as error:
            raise ValueError(f"{name}, at density {density:g}: {error}") from None
    shorter = {name: move(old[name], pattern)(leaves[name]) for name, pattern in new.items()}
    found = {**variables, "params": with_leaves(variables["params"], shorter)}
    found[SPARSITY] = with_new_patterns(variables[SPARSITY], new)
    return found, Patterns(old, new)


def check_capacity(patterns: Mapping[str, Pattern], names: Sequence[str], density: float, scope: str) -> None:
    """Raise where a stage would keep more entries than patterns have.

    Raises:
      ValueError: It would, of a weight, or of all together.
    """
    shapes = {name: _shape(patterns[name]) for name in names}
    has = {name: np.asarray(patterns[name].starts)[..., -1].reshape(-1) for name in names}
    if scope == "global":
        wanted = {"all weights": round(density * sum(layers * m * n for layers, m, n in shapes.values()))}
        there = {"all weights": int(sum(counts.sum() for counts in has.values()))}
    else:
        units = {name: 1 if (block := patterns[name].block) is None else block[0] * block[1] for name in names}
        kept = _choose.counts({name: _in_units(patterns[name]) for name in names}, density, scope)
        wanted = {name: kept[name] * units[name] for name in names}
        there = {name: int(counts.min()) for name, counts in has.items()}
    for name, count in wanted.items():
        if count > there[name]:
            raise ValueError(
                f"A stage of density {density:g} keeps {count} entries of {name}, and the pattern has {there[name]}: "
                "that grows density above its capacity, and pruning drops only. Begin with a lower density, or with "
                "more entries."
            )


def _chosen(
    weights: dict[str, np.ndarray],
    masks: dict[str, np.ndarray],
    blocks: dict[str, tuple[int, int] | None],
    density: float,
    scope: str,
) -> dict[str, np.ndarray]:
    """Return masks of what is kept, `[layers, m, n]`; blocks by their norms."""
    cut, among = dict(weights), dict(masks)
    for name, block in blocks.items():
        if block is not None:
            cut |= _choose.in_blocks({name: weights[name]}, block)
            among |= {name: _choose.in_blocks({name: masks[name].astype(np.float32)}, block)[name] > 0}
    if scope == "global":
        chosen = _choose.largest_of_all(cut, density, among)
    else:
        shapes = {name: (weight.shape[0], weight.shape[1], weight.shape[2]) for name, weight in cut.items()}
        chosen = _choose.largest(cut, _choose.counts(shapes, density, scope), among)
    whole = lambda name, block: chosen[name] if block is None else _choose.of_blocks({name: chosen[name]}, block)[name]
    return {name: whole(name, block) for name, block in blocks.items()}


def _shape(pattern: Pattern) -> tuple[int, int, int]:
    return (int(np.prod(pattern.stacked, dtype=np.int64)), *pattern.matrix_shape)


def _in_units(pattern: Pattern) -> tuple[int, int, int]:
    layers, m, n = _shape(pattern)
    return (layers, m, n) if pattern.block is None else (layers, m // pattern.block[0], n // pattern.block[1])
