"""Products with a sparse weight whose entries come in blocks: each block is a small dense product.

Tile t has the inputs `at_input[t]` and the features `at_feature[t]`, in blocks of the sizes of the pattern:

    y[:, at_feature[t]] += x[:, at_input[t]] w_t,     dw_t = x[:, at_input[t]]ᵀ g[:, at_feature[t]]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msbp_jax.formats import accumulation_dtype
from msbp_jax.weights import Pattern


class _Tiles(NamedTuple):
    """Where the tiles of a pattern stand.

    Attributes:
      entries: `[tiles, height, width]`: the number of each value.
      at_input: `[tiles]`: which block of inputs.
      at_feature: `[tiles]`: which block of features; beyond the last for padding.
    """

    entries: Int[Array, "tiles height width"]
    at_input: Int[Array, " tiles"]
    at_feature: Int[Array, " tiles"]


def times(
    x: Float[Array, "rows inner"], values: Float[Array, " entries"], pattern: Pattern, turned: bool, precision: Any
) -> Float[Array, "rows outer"]:
    """See `msbp_jax.kernels.weights.times`."""
    tiles, (m, n), (height, width) = _tiles(pattern), pattern.matrix_shape, _block(pattern)
    w = values[tiles.entries]
    inner, size, outer, out_size = (n, width, m, height) if turned else (m, height, n, width)
    taken, given = (tiles.at_feature, tiles.at_input) if turned else (tiles.at_input, tiles.at_feature)
    blocks = x.reshape(-1, inner // size, size).at[:, taken].get(mode="fill", fill_value=0)
    dtype = accumulation_dtype(x.dtype, values.dtype)
    letters = "rtj,tij->rti" if turned else "rti,tij->rtj"
    kind = jnp.promote_types(blocks.dtype, w.dtype)
    made = jnp.einsum(letters, blocks.astype(kind), w.astype(kind), precision=precision, preferred_element_type=dtype)
    y = jnp.zeros((len(x), outer // out_size, out_size), dtype).at[:, given].add(made, mode="drop")
    return y.reshape(len(x), outer)


def gradient(
    x: Float[Array, "rows m"], g: Float[Array, "rows n"], pattern: Pattern, precision: Any
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.weights.gradient`."""
    tiles, (height, width) = _tiles(pattern), _block(pattern)
    dtype, kind = accumulation_dtype(x.dtype, g.dtype), jnp.promote_types(x.dtype, g.dtype)
    cut = lambda array, size, at: (
        array.reshape(len(array), -1, size).at[:, at].get(mode="fill", fill_value=0).astype(kind)
    )
    of_x, of_g = cut(x, height, tiles.at_input), cut(g, width, tiles.at_feature)
    made = jnp.einsum("rti,rtj->tij", of_x, of_g, precision=precision, preferred_element_type=dtype)
    return jnp.zeros(pattern.entries, dtype).at[tiles.entries].set(made, mode="drop", unique_indices=True)


def _block(pattern: Pattern) -> tuple[int, int]:
    assert pattern.block is not None
    return pattern.block


def _tiles(pattern: Pattern) -> _Tiles:
    """Return the tiles: every feature of a block of features has the same list of blocks of inputs."""
    height, width = _block(pattern)
    count = pattern.entries // (height * width)
    tile = jnp.arange(count, dtype=jnp.int32)
    firsts = pattern.starts[::width]  # of the first feature of each block, and the end
    ends = firsts[1:] // (height * width)
    at_feature = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
    block = jnp.minimum(at_feature, len(ends) - 1)
    begin = jnp.where(block > 0, ends[block - 1], 0)
    in_list = tile - begin  # which of the tiles of its block of features
    features = block[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None]
    run = pattern.starts[features] + in_list[:, None] * height  # [tiles, width]
    entries = run[:, None, :] + jnp.arange(height, dtype=jnp.int32)[None, :, None]
    padding = (at_feature >= len(ends))[:, None, None]
    own = tile[:, None, None] * (height * width) + jnp.arange(height * width, dtype=jnp.int32).reshape(1, height, width)
    entries = jnp.where(padding, own, entries)
    at_input = jnp.where(padding[:, 0, 0], 0, pattern.inputs[jnp.minimum(run[:, 0], pattern.entries - 1)] // height)
    return _Tiles(entries, at_input.astype(jnp.int32), at_feature)
