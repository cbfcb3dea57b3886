"""Entries that give way to others, as many as there were: the pattern's arrays made anew, in shapes that stay.

A place is one number, `feature * m + input`, so that entries in order are numbers in order, and m n stands for none.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msbp_jax.kernels import places
from msbp_jax.weights import Pattern, of_layers


class Replaced(NamedTuple):
    """A new pattern, and where its values come from.

    Attributes:
      pattern: With as many entries.
      source: `[..., entries]`, int32: which of the old values each is; the number of entries for a new one, and for
        padding.
    """

    pattern: Pattern
    source: Int[Array, "... entries"]


def replaced(
    pattern: Pattern,
    values: Float[Array, "... entries"],
    scores: Float[Array, ...],
    count: Int[Array, ...],
    *,
    regrow: bool,
) -> Replaced:
    """Return a pattern in which the entries of the smallest values have given way to places of the largest scores.

    Ties go to the first: feature by feature, input by input.

    Args:
      pattern: Of entries anywhere.
      values: Of its entries.
      scores: In the shape of the dense weight, at least 0.
      count: `[...]`, int32, for each layer: how many entries are dropped; fewer where there are not as many places.
      regrow: Whether what was dropped may be chosen again; it is then as if it had not been dropped.
    """
    m, n = pattern.matrix_shape

    def layer(pattern: Pattern, values: jax.Array, scores: jax.Array, count: jax.Array) -> Replaced:
        entries, free = values.shape[0], m * n - pattern.starts[-1]
        features = pattern.features_by_entry()
        codes = jnp.where(features < n, features * m + pattern.inputs, m * n)
        is_entry = codes < m * n
        count = count if regrow else jnp.minimum(count, free)
        dropped = _smallest(values, is_entry, count)
        flat = scores.reshape(m, n).T.reshape(-1).astype(jnp.float32)
        # What is worth nothing is no better than what was there: then an entry that was dropped comes back.
        worth = jnp.where(jnp.isfinite(flat) & (flat > 0), flat, -1.0 if regrow else 0.0)
        own = worth.at[codes].get(mode="fill", fill_value=-1.0)
        again = jnp.where(dropped, jnp.maximum(own, 0.0), -1.0) if regrow else -1.0
        grown = places.largest(worth.at[codes].set(again, mode="drop"), count, entries)
        at = jnp.minimum(jnp.searchsorted(codes, grown), entries - 1).astype(jnp.int32)
        regrown = jnp.where((codes[at] == grown) & (grown < m * n), at, entries)
        both = jnp.concatenate([jnp.where(dropped, m * n, codes), grown])
        whence = jnp.concatenate([jnp.arange(entries, dtype=jnp.int32), regrown])
        codes, source = (array[:entries] for array in jax.lax.sort((both, whence), num_keys=1))
        return Replaced(_pattern(pattern, codes), jnp.where(codes < m * n, source, entries))

    return of_layers(pattern, layer)(pattern, values, scores, count)


def followed(source: Int[Array, "... entries"], values: jax.Array) -> jax.Array:
    """Return what stands in the places of a new pattern, 0 where it is new; of values, or of moments like them."""
    one = lambda source, values: values.at[source].get(mode="fill", fill_value=0)
    for _ in range(source.ndim - 1):
        one = jax.vmap(one)
    return one(source, values)


def entry_counts(pattern: Pattern) -> Int[Array, ...]:
    """Return how many entries each layer has, without padding."""
    return pattern.starts[..., -1]


def _smallest(values: jax.Array, among: jax.Array, count: jax.Array) -> jax.Array:
    """Return a mask of the values of smallest magnitude, ties to the first; what is no number counts as the largest."""
    limit = jnp.float32(jnp.finfo(jnp.float32).max)
    magnitudes = jnp.nan_to_num(jnp.minimum(jnp.abs(values).astype(jnp.float32), limit), nan=limit)
    # Floats that are not negative are ordered as their bits are: turned around, the smallest is the largest.
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
    turned = jax.lax.bitcast_convert_type(bits(limit) - bits(magnitudes), jnp.float32)
    at = places.largest(jnp.where(among, turned, -1.0), count, len(values))
    return jnp.zeros(len(values), bool).at[at].set(True, mode="drop")


def _pattern(old: Pattern, codes: jax.Array) -> Pattern:
    """Return the pattern of places that ascend, m n for padding at the end."""
    m, n = old.matrix_shape
    is_entry = codes < m * n
    features, inputs = codes // m, codes % m
    by_input = jnp.where(is_entry, inputs * n + features, m * n)
    sorted_codes, order = jax.lax.sort((by_input, jnp.arange(len(codes), dtype=jnp.int32)), num_keys=1)
    starts = lambda codes, size, lists: jnp.searchsorted(codes, size * jnp.arange(lists + 1, dtype=jnp.int32))
    return old.replace(
        starts=starts(codes, m, n).astype(jnp.int32),
        inputs=jnp.where(is_entry, inputs, 0),
        input_starts=starts(sorted_codes, n, m).astype(jnp.int32),
        features=jnp.where(sorted_codes < m * n, sorted_codes % n, 0),
        order=jnp.where(sorted_codes < m * n, order, 0),
    )
