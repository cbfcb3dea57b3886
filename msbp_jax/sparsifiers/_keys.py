"""PRNG keys in the states of sparsifiers: where they start, and how every site, instance and use comes to its own.

Keys are moved about as bits: JAX's search for keys used twice takes what it does not know for a use.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat


class StartingKey:
    """A key that a user chose, as a value among a sparsifier's settings: compared, hashed and pickled by its bits.

    Args:
      array: One typed PRNG key.
    """

    def __init__(self, array: jax.Array) -> None:
        self.array = array

    @classmethod
    def checked(cls, key: Any) -> StartingKey:
        """Return the key.

        Raises:
          TypeError: It is not a single typed PRNG key.
        """
        if not isinstance(key, jax.Array) or not _compat.is_key(key) or key.shape != ():
            raise TypeError(f"key must be one typed PRNG key such as jax.random.key(0), got {key!r}.")
        return cls(key)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StartingKey) or self.array is other.array:
            return isinstance(other, StartingKey)
        if isinstance(self.array, _compat.Tracer) or isinstance(other.array, _compat.Tracer):
            return False
        return self._bits() == other._bits()

    def __hash__(self) -> int:
        return hash(StartingKey)  # the same for all keys: the bits of a traced one are not known

    def __reduce__(self) -> Any:
        return _restored, self._bits()

    def _bits(self) -> tuple[str, tuple[int, ...]]:
        return str(jax.random.key_impl(self.array)), tuple(jax.random.key_data(self.array).tolist())


def _restored(implementation: str, bits: tuple[int, ...]) -> StartingKey:
    return StartingKey(jax.random.wrap_key_data(jnp.asarray(bits, jnp.uint32), impl=implementation))


def split_keys(leaf: jax.Array, count: int) -> jax.Array:
    """Return a leaf of typed PRNG keys, of any shape, as `[count, ...]` keys made from them."""
    if leaf.shape == ():
        return jax.random.split(leaf, count)
    each = jax.vmap(lambda key: jax.random.split(key, count))(leaf.reshape(-1))
    bits = jnp.moveaxis(jax.random.key_data(each), 1, 0).reshape(count, *leaf.shape, -1)
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))


def select_keys(which: jax.Array, these: jax.Array, others: jax.Array) -> jax.Array:
    """Return `where(which, these, others)` for arrays of typed PRNG keys."""
    bits = jnp.where(which[..., None], jax.random.key_data(these), jax.random.key_data(others))
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(others))


type Kinds = tuple[str | None, ...]


def keys_as_bits(tree: Any) -> tuple[Any, Kinds]:
    """Return a pytree with its typed PRNG keys as bits, and of which kind each leaf's keys are, None for no keys."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = tuple(str(jax.random.key_impl(leaf)) if _compat.is_key(leaf) else None for leaf in leaves)
    bits = [leaf if kind is None else jax.random.key_data(leaf) for leaf, kind in zip(leaves, kinds, strict=True)]
    return jax.tree.unflatten(structure, bits), kinds


def bits_as_keys(tree: Any, kinds: Kinds) -> Any:
    """Return what `keys_as_bits` was given."""
    leaves, structure = jax.tree.flatten(tree)
    keys = [
        leaf if kind is None else jax.random.wrap_key_data(leaf, impl=kind)
        for leaf, kind in zip(leaves, kinds, strict=True)
    ]
    return jax.tree.unflatten(structure, keys)


def fold_name(leaf: jax.Array, name: str) -> jax.Array:
    """Return a leaf of typed PRNG keys, of any shape, made different by a name."""
    return fold(leaf, zlib.crc32(name.encode()))


def fold(leaf: jax.Array, number: Any) -> jax.Array:
    """Return a leaf of typed PRNG keys, of any shape, made different by a number."""
    folded = jax.vmap(jax.random.fold_in, (0, None))(leaf.reshape(-1), jnp.asarray(number, jnp.uint32))
    return folded.reshape(leaf.shape)


def keys_of_devices(tree: Any, arrays: Any) -> Any:
    """Return a state for use with arrays; inside a `shard_map`, devices that share a key and not these draw apart.

    That they do not is seen where `shard_map` checks types.
    """

    def of_device(leaf: jax.Array) -> jax.Array:
        for axis in _compat.axes_lacked(leaf, arrays) if _compat.is_key(leaf) else ():
            leaf = fold(leaf, jax.lax.axis_index(axis))
        return leaf

    return jax.tree.map(of_device, tree)
