"""`SparseWeight`: values and their pattern, which stand for a dense weight while a program runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._checks import path_name
from msbp_jax.weights._pattern import Pattern, check_sizes, is_pattern, scattered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseWeight:
    """A weight that has the entries of a pattern, and zeros.

    Attributes:
      values: `[..., entries]`, floating.
      pattern: Where they stand.
      turned: Whether input and output axes are exchanged.
      backend: What runs its products, "native", "tiles" or "xla"; None to choose.
    """

    values: jax.Array
    pattern: Pattern
    turned: bool = dataclasses.field(default=False, metadata={"static": True})
    backend: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        shape, cut = self.pattern.shape, self.pattern.input_axes
        inner = (*shape[cut:], *shape[:cut]) if self.turned else shape
        return (*self.values.shape[:-1], *inner)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """How many axes the dense weight has."""
        return len(self.shape)

    @property
    def leading(self) -> int:
        """How many of its axes, from the first on, are of the side that stands first."""
        axes, cut = len(self.pattern.shape), self.pattern.input_axes
        return axes - cut if self.turned else cut

    def astype(self, dtype: jax.typing.DTypeLike) -> SparseWeight:
        """Return the same weight in another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def varying_over(self, axes: tuple[str, ...]) -> SparseWeight:
        """Return the same weight, of a type that differs between the devices of some mesh axes of a `shard_map`."""
        return dataclasses.replace(self, values=_compat.varying_over(self.values, axes))

    def transposed(self, permutation: tuple[int, ...]) -> SparseWeight | None:
        """Return the weight with its axes permuted, or None unless inputs and outputs merely change places."""
        axes, cut = len(self.pattern.shape), self.leading
        if self.ndim != axes or permutation != (*range(cut, axes), *range(cut)):
            return None
        return dataclasses.replace(self, turned=not self.turned)

    def dense(self) -> jax.Array:
        """Return the dense weight; its gradient is that of the values."""
        whole = scattered(self.pattern, self.values)
        if not self.turned:
            return whole
        stacked, cut, axes = self.values.ndim - 1, self.pattern.input_axes, len(self.pattern.shape)
        own = [*range(cut, axes), *range(cut)]
        return jnp.transpose(whole, [*range(stacked), *(stacked + axis for axis in own)])


def is_sparse(node: Any) -> bool:
    """Whether a node of a pytree is a sparse weight."""
    return isinstance(node, SparseWeight)


def with_patterns(params: Any, patterns: Any, backend: str | None = None) -> Any:
    """Return parameters with a `SparseWeight` in place of the values of each pattern.

    Args:
      params: A pytree of parameters.
      patterns: The collection "sparsity": the same tree, with a `Pattern` where the weight is sparse, and nothing
        elsewhere.
      backend: What runs the products of the weights; None to choose.

    Raises:
      ValueError: A pattern is of no parameter, or of one with another number of entries, or has no blocks where the
        backend multiplies blocks.
    """
    keyed = jax.tree_util.tree_flatten_with_path(patterns, is_leaf=is_pattern)[0]
    if wrong := [path_name(path) for path, node in keyed if not is_pattern(node)]:
        raise ValueError(
            f"The sparsity of {wrong[0]} is not a pattern. msbp.prune makes them; from a checkpoint they are restored "
            "with a target, such as the variables that msbp.prune made at first."
        )
    by_path = {path_name(path): pattern for path, pattern in keyed}

    def merged(path: Any, leaf: Any) -> Any:
        pattern = by_path.pop(path_name(path), None)
        if pattern is None:
            return leaf
        expected = tuple(pattern.inputs.shape)
        if tuple(jnp.shape(leaf)) != expected:
            raise ValueError(
                f"The parameter {path_name(path)} has shape {tuple(jnp.shape(leaf))}, and its pattern is of "
                f"{expected} entries. Are they of one model? msbp.prune makes both."
            )
        check_sizes(pattern, path_name(path))
        if backend == "tiles" and pattern.block is None:
            raise ValueError(
                f'backend="tiles" multiplies blocks, and the entries of {path_name(path)} stand anywhere. '
                "msbp.prune(..., block=(16, 16)) makes blocks; backend=None chooses for each weight."
            )
        return SparseWeight(leaf, pattern, backend=backend)

    found = jax.tree_util.tree_map_with_path(merged, params)
    if by_path:
        known = ", ".join(path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0])
        raise ValueError(f"There are patterns of {', '.join(sorted(by_path))}, and parameters {known}.")
    return found
