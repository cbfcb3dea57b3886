"""Members of a `vmap` that share a state: each draws with a key of its own, and each counts as a use of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from msbp_jax import _compat
from msbp_jax.sparsifiers._keys import split_keys


def member_keys(leaf: jax.Array, g: jax.Array) -> jax.Array:
    """Return a leaf of a state; where `vmap` maps the gradient and not the leaf, its keys are split over the members.

    Args:
      leaf: Any leaf; one that holds no keys is returned as it is.
      g: The gradient that the state is used with.
    """
    if not _compat.is_key(leaf):
        return leaf
    implementation = jax.random.key_impl(leaf)

    def split(bits: jax.Array, size: int) -> jax.Array:
        return jax.random.key_data(split_keys(jax.random.wrap_key_data(bits, impl=implementation), size))

    return jax.random.wrap_key_data(_by_member(split, jax.random.key_data(leaf), g), impl=implementation)


def each_member(array: ArrayLike, g: jax.Array) -> jax.Array:
    """Return an array; where `vmap` maps the gradient and not the array, once for each member.

    A cotangent that is the same for all members is added up over them only if it is there for each.
    """
    return _by_member(lambda array, size: jnp.broadcast_to(array, (size, *array.shape)), jnp.asarray(array), g)


def _by_member(spread: Callable[[jax.Array, int], jax.Array], array: jax.Array, g: jax.Array) -> jax.Array:
    """Return the array, through `spread(array, members)` for every `vmap` that maps g and not the array."""

    @jax.custom_batching.custom_vmap
    def for_each(array: jax.Array, g: jax.Array) -> jax.Array:
        del g
        return array

    @for_each.def_vmap
    def _over_members(size: int, batched: Sequence[bool], array: ArrayLike, g: ArrayLike) -> tuple[Any, bool]:
        outer = for_each(jnp.asarray(array), jnp.asarray(g))  # as an outer vmap has it
        return (outer if batched[0] else spread(outer, size)), True

    return for_each(array, g)
