"""Where the entries of a sparse weight stand: whole numbers, in both orders, which no optimizer touches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int


class Pattern(struct.PyTreeNode):
    """Which entries a weight has; the weight is taken as a matrix `[m, n]`, inputs by output features.

    Values are listed feature by feature, the inputs of each ascending. Layers that are stacked have a pattern each, of
    equal length: what is missing is padded at the end, where no list reaches.

    Attributes:
      starts: `[..., n + 1]`, int32: feature o has the entries `starts[o]` to `starts[o + 1]`.
      inputs: `[..., entries]`, int32: the input of each.
      input_starts: `[..., m + 1]`, int32: the same, input by input.
      features: `[..., entries]`, int32: the feature of each in that order.
      order: `[..., entries]`, int32: which value it is.
      shape: Of the dense weight, without the axes of stacked layers.
      input_axes: How many of its axes, from the first on, are contracted with the input.
      block: Inputs and features of the blocks that entries come in, aligned to their sizes; None for entries anywhere.
    """

    starts: jax.Array
    inputs: jax.Array
    input_starts: jax.Array
    features: jax.Array
    order: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    input_axes: int = struct.field(pytree_node=False, default=1)
    block: tuple[int, int] | None = struct.field(pytree_node=False, default=None)

    @property
    def entries(self) -> int:
        """How many entries there are, padding included."""
        return int(self.inputs.shape[-1])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(m, n)` of the weight as a matrix."""
        cut = self.input_axes
        return math.prod(self.shape[:cut]), math.prod(self.shape[cut:])

    @property
    def stacked(self) -> tuple[int, ...]:
        """Axes of stacked layers."""
        return tuple(self.inputs.shape[:-1])

    @property
    def density(self) -> float:
        """Share of the entries, padding included."""
        return self.entries / max(1, math.prod(self.shape))

    def features_by_entry(self) -> Int[Array, "... entries"]:
        """Return the feature of each value, n for padding."""
        at = jnp.arange(self.entries, dtype=jnp.int32)
        find = lambda starts: jnp.searchsorted(starts[1:], at, side="right").astype(jnp.int32)
        return of_layers(self, find)(self.starts)

    def mask(self) -> Bool[Array, ...]:
        """Return a mask in the shape of the dense weight, True where there is an entry."""
        return scattered(self, jnp.ones(self.inputs.shape, bool))


def is_pattern(node: Any) -> bool:
    """Whether a node of a pytree is a pattern."""
    return isinstance(node, Pattern)


def of_layers(pattern: Pattern, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of one layer's arrays, mapped over the axes of stacked layers."""
    for _ in pattern.stacked:
        function = jax.vmap(function)
    return function


def scattered(pattern: Pattern, values: jax.Array) -> jax.Array:
    """Return the dense weight with these values at its entries, and zeros.

    Args:
      pattern: Where.
      values: `[..., entries]`.
    """
    m, n = pattern.matrix_shape

    def one(inputs: jax.Array, features: jax.Array, values: jax.Array) -> jax.Array:
        flat = jnp.zeros((m, n), values.dtype)
        return flat.at[inputs, features].set(values, mode="drop", unique_indices=True)

    dense = of_layers(pattern, one)(pattern.inputs, pattern.features_by_entry(), values)
    return dense.reshape(*pattern.stacked, *pattern.shape)


def gathered(pattern: Pattern, dense: jax.Array) -> jax.Array:
    """Return the values `[..., entries]` that a dense weight has at the entries of a pattern; 0 for padding."""
    m, n = pattern.matrix_shape

    def one(inputs: jax.Array, features: jax.Array, matrix: jax.Array) -> jax.Array:
        return matrix.at[inputs, features].get(mode="fill", fill_value=0)

    return of_layers(pattern, one)(pattern.inputs, pattern.features_by_entry(), dense.reshape(*pattern.stacked, m, n))


def pattern_of(mask: Any, *, input_axes: int = 1, stacked: int = 0, block: tuple[int, int] | None = None) -> Pattern:
    """Return the pattern of a mask.

    Args:
      mask: True where the weight has an entry; an array that is not traced.
      input_axes: How many axes, from the first of the weight on, are contracted with the input.
      stacked: How many axes in front of those are of stacked layers.
      block: Inputs and features of the blocks that it consists of; None for entries anywhere.

    Raises:
      TypeError: The mask is not boolean.
      ValueError: It has fewer axes than a weight, or keeps nothing, or does not consist of blocks.
    """
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"A mask must be boolean, True where a weight is kept, got {mask.dtype}.")
    shape = mask.shape[stacked:]
    if not 0 < input_axes < len(shape):
        raise ValueError(
            f"A sparse weight needs input and output axes: of shape {shape}, {input_axes} axes cannot be the inputs."
        )
    m, n = math.prod(shape[:input_axes]), math.prod(shape[input_axes:])
    matrices = mask.reshape(-1, m, n)
    counts = matrices.sum(axis=(1, 2))
    if not counts.size or counts.min() == 0:
        raise ValueError("A mask keeps nothing of a weight; leave such a weight dense, or take it out of the model.")
    if m * n >= 2**31:
        raise ValueError(f"A sparse weight has up to 2^31 entries if it were dense, got {m} x {n}.")
    if block is not None:
        _check_blocks(matrices, block)
    parts = [_lists(matrix, int(counts.max())) for matrix in matrices]
    arrays = [jnp.asarray(np.stack(part).reshape(*mask.shape[:stacked], -1)) for part in zip(*parts, strict=True)]
    names = ("starts", "inputs", "input_starts", "features", "order")
    return Pattern(**dict(zip(names, arrays, strict=True)), shape=shape, input_axes=input_axes, block=block)


def _check_blocks(matrices: np.ndarray, block: tuple[int, int]) -> None:
    """Raise unless masks consist of whole blocks."""
    layers, m, n = matrices.shape
    height, width = block
    if m % height or n % width:
        raise ValueError(f"A weight of {m} x {n} cannot be cut into blocks of {height} x {width}.")
    cut = matrices.reshape(layers, m // height, height, n // width, width)
    if (cut.any(axis=(2, 4)) != cut.all(axis=(2, 4))).any():
        raise ValueError(f"The mask does not consist of blocks of {height} x {width}.")


def _lists(mask: np.ndarray, entries: int) -> tuple[np.ndarray, ...]:
    """Return the arrays of a pattern, padded to so many entries."""
    features, inputs = np.nonzero(mask.T)
    number = np.zeros(mask.shape, np.int32)
    number[inputs, features] = np.arange(len(inputs), dtype=np.int32)
    by_input, their_features = np.nonzero(mask)
    starts = lambda axis: np.concatenate([[0], np.cumsum(mask.sum(axis=axis))]).astype(np.int32)
    padded = lambda array: np.pad(array.astype(np.int32), (0, entries - len(array)))
    order = number[by_input, their_features]
    return starts(0), padded(inputs), starts(1), padded(their_features), padded(order)


def check_sizes(pattern: Pattern, name: str) -> None:
    """Raise unless the arrays of a pattern have the lengths that its shape asks for; takes traced ones too.

    Raises:
      ValueError: They have not, as where arrays of another model were restored.
    """
    m, n = pattern.matrix_shape
    stacked, entries = pattern.inputs.shape[:-1], pattern.entries
    lengths = {"starts": n + 1, "inputs": entries, "input_starts": m + 1, "features": entries, "order": entries}
    for part, length in lengths.items():
        got = tuple(getattr(pattern, part).shape)
        if got != (*stacked, length):
            raise ValueError(
                f"{name}: the {part} of its pattern, of a weight {m} x {n} with {entries} entries, must have shape "
                f"{(*stacked, length)}, got {got}. Was the pattern of another model restored?"
            )


def check_pattern(pattern: Pattern, name: str) -> None:
    """Raise unless the numbers of a pattern are what its shape promises; takes arrays that are not traced.

    Raises:
      ValueError: Starts that do not grow, or indices that are out of range, not ascending, or twice there.
    """
    check_sizes(pattern, name)
    m, n = pattern.matrix_shape
    layers = lambda array: np.asarray(array).reshape(-1, array.shape[-1])
    for starts, inputs, input_starts, features, order in zip(
        *map(layers, (pattern.starts, pattern.inputs, pattern.input_starts, pattern.features, pattern.order)),
        strict=True,
    ):
        for begins, at, size, lists, of in (
            (starts, inputs, m, n, "inputs"),
            (input_starts, features, n, m, "features"),
        ):
            if len(begins) != lists + 1 or begins[0] != 0 or (np.diff(begins) < 0).any() or begins[-1] > len(at):
                raise ValueError(f"{name}: the starts of its pattern must grow from 0 to at most {len(at)}.")
            used = at[: begins[-1]]
            if ((used < 0) | (used >= size)).any():
                raise ValueError(f"{name}: the {of} of its pattern must lie in [0, {size}).")
            inner = np.ones(len(used), bool)
            inner[begins[:-1][begins[:-1] < len(used)]] = False
            if len(used) and (np.diff(used, prepend=-1) <= 0)[inner].any():
                raise ValueError(f"{name}: the {of} of each list of its pattern must ascend, and none be there twice.")
        whose = np.repeat(np.arange(n), np.diff(starts))
        back = order[: input_starts[-1]]
        if input_starts[-1] != starts[-1] or ((back < 0) | (back >= starts[-1])).any():
            raise ValueError(f"{name}: its pattern has other entries input by input than feature by feature.")
        by_input = np.repeat(np.arange(m), np.diff(input_starts))
        if pattern.block is not None:
            mask = np.zeros((1, m, n), bool)
            mask[0, inputs[: starts[-1]], whose] = True
            _check_blocks(mask, pattern.block)
        same = (inputs[back] == by_input) & (whose[back] == features[: input_starts[-1]])
        if not same.all():
            raise ValueError(f"{name}: its pattern has other entries input by input than feature by feature.")
