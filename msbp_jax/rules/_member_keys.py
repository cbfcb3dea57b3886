"""Members of a `vmap` that share a key draw with one of their own each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

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

    @jax.custom_batching.custom_vmap
    def own(bits: jax.Array, g: jax.Array) -> jax.Array:
        del g
        return bits

    @own.def_vmap
    def _over_members(size: int, batched: Sequence[bool], bits: jax.Array, g: jax.Array) -> tuple[Any, bool]:
        bits = own(bits, g)  # as an outer vmap has it
        if batched[0]:
            return bits, True
        keys = split_keys(jax.random.wrap_key_data(bits, impl=implementation), size)
        return jax.random.key_data(keys), True

    return jax.random.wrap_key_data(own(jax.random.key_data(leaf), g), impl=implementation)
