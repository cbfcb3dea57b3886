"""How large variables are at a stage: what a checkpoint is restored into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax.dynamic._schedule import leaves_of, shapes, with_leaves, with_new_patterns
from msbp_jax.weights import SPARSITY, Pattern, prune


def pruned_shapes(variables: Mapping[str, Any], density: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return dense variables as `prune` would shape them, whatever their numbers are."""
    draw = np.random.default_rng(0)
    floating = lambda leaf: jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    # Any numbers that differ, so that no weight loses all of its entries to another one.
    drawn = lambda leaf: jnp.asarray(draw.normal(size=np.shape(leaf)), leaf.dtype) if floating(leaf) else leaf
    return prune({**variables, "params": jax.tree.map(drawn, variables["params"])}, density=density, **options)


def resized(variables: Mapping[str, Any], patterns: Mapping[str, Pattern], entries: Mapping[str, int]) -> Any:
    """Return shapes of variables in which some weights have other numbers of entries.

    Args:
      variables: With patterns.
      patterns: Of the weights, by path.
      entries: How many numbers the leaf of each has.
    """
    of_patterns, of_values, leaves = {}, {}, leaves_of(variables["params"])
    for name, pattern in patterns.items():
        each = entries[name] // max(1, math.prod(pattern.stacked))
        listed = jax.ShapeDtypeStruct((*pattern.stacked, each), jnp.int32)
        of_patterns[name] = shapes(pattern).replace(inputs=listed, features=listed, order=listed)
        of_values[name] = jax.ShapeDtypeStruct(listed.shape, leaves[name].dtype)
    found = {**shapes(dict(variables)), "params": with_leaves(shapes(variables["params"]), of_values)}
    return found | {SPARSITY: with_new_patterns(found[SPARSITY], of_patterns)}
