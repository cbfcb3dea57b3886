"""Wrappers that return a sparsifier: what is not propagated in a step is remembered and used in the next ones."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _checks, _compat
from msbp_jax.formats import Columns, Dense, Format
from msbp_jax.kernels._residual import add_memory, carried_on
from msbp_jax.sparsifiers import Sparsifier, _base
from msbp_jax.sparsifiers._base import State


class MemorizedState(NamedTuple):
    """State of a memorized sparsifier.

    Attributes:
      residual: What was not propagated, float32, 0 at the start: `[n]` for `reduce="mean"`, `[rows, n]` for `"slot"`.
      inner: State of the wrapped sparsifier.
    """

    residual: jax.Array
    inner: State


def memorized(
    sparsifier: Sparsifier,
    decay: float,
    *,
    reduce: Literal["mean", "slot", "local"] = "mean",
    shards: int | None = None,
) -> Sparsifier:
    r"""Remember what `sparsifier` drops and add it to the next gradient (memorized sparse backpropagation).

        u = g + m,      p = S(u),      m' = decay * R(u - p),

    where `g` is the gradient of the layer's output, `p` is what both products of the backward see, and `R` is the mean
    over rows (`"mean"`), the mean over the rows of each shard (`"local"`), or the identity (`"slot"`).

    Args:
      sparsifier: `S`, any sparsifier.
      decay: How much of the residual is carried on, in [0, 1]; the paper's memory ratio. `decay=0` is `S` itself.
      reduce: `"mean"`: m is `[n]`, the mean of the residual over rows, added to every row, whatever the batch size.
        `"slot"`: m is `[rows, n]`, each row for itself; every step must then have the same number of rows.
        `"local"`: m is `[shards, n]`; the rows are cut into `shards` equal blocks, each of which chooses and remembers
        for itself, so that devices which hold a block each have nothing to tell one another.
      shards: Blocks of `"local"`; None for as many as JAX has devices. Inside a `shard_map` every device is a block.

    Returns:
      The sparsifier. Its memory is float32 whatever the gradient's dtype and starts at 0. Entries of the residual that
      are not finite are remembered as 0, so that one bad step cannot spoil the next; they are propagated as usual.
      Where `S` keeps everything, so does this, without memory.

    Raises:
      ValueError: `decay` outside [0, 1], an unknown `reduce`, `shards` without `reduce="local"`; later, rows that
        cannot be cut into `shards` blocks of whole groups.
      TypeError: `sparsifier` is not a `Sparsifier`, or `decay` not a number.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.memorized(msbp.top_k(density=0.04, rows_per_group=32), decay=0.8)
      memorized(top_k(density=0.04, rows_per_group=32), decay=0.8)

    References:
      Zhang et al., Memorized Sparse Backpropagation, 2019 (arXiv 1905.10194).
    """
    if not isinstance(sparsifier, Sparsifier):
        raise TypeError(f"memorized wraps a Sparsifier such as msbp.top_k(density=0.04), got {sparsifier!r}.")
    ratio = _checks.fraction("decay", decay, zero=True, meaning="share of the residual that is carried on")
    if reduce not in ("mean", "slot", "local"):
        raise ValueError(
            f'reduce must be "mean" (one memory of [n]), "slot" (one of [rows, n]) or "local" (one of [n] for each '
            f"shard of the batch), got {reduce!r}."
        )
    if shards is not None:
        if reduce != "local":
            raise ValueError(f'shards={shards!r} is for reduce="local", got reduce={reduce!r}. Leave it out.')
        _checks.positive_int("shards", shards, "blocks of rows with a memory each")
    if ratio == 0:
        return sparsifier
    if reduce == "local":
        return _in_shards(memorized(sparsifier, ratio), shards, f'{sparsifier.name}, decay={ratio:g}, reduce="local"')

    def init(aval: jax.ShapeDtypeStruct) -> MemorizedState:
        shape = aval.shape if reduce == "slot" else aval.shape[1:]
        return MemorizedState(jnp.zeros(shape, jnp.float32), sparsifier.init(aval))

    def apply(g: jax.Array, state: MemorizedState) -> tuple[Format, MemorizedState]:
        if sparsifier.with_memory is not None:
            p, residual, inner = sparsifier.with_memory(g, state.residual, ratio, state.inner)
            return p, MemorizedState(residual, inner)
        u = add_memory(g, state.residual)
        p, inner = sparsifier.apply(u, state.inner)
        return p.astype(g.dtype), MemorizedState(carried_on(u, p, ratio, by_slot=reduce == "slot"), inner)

    kind = "" if reduce == "mean" else ', reduce="slot"'
    by_example = sparsifier.per_example
    return Sparsifier(
        init=init,
        apply=apply,
        name=f"memorized({sparsifier.name}, decay={ratio:g}{kind})",
        is_identity=sparsifier.is_identity,
        per_example=by_example and (lambda rows: memorized(by_example(rows), ratio, reduce=reduce)),
    )


def _in_shards(sparsifier: Sparsifier, shards: int | None, name: str) -> Sparsifier:
    """Return a sparsifier that treats equal blocks of consecutive rows each for itself, with a state each.

    Args:
      sparsifier: What treats a block.
      shards: How many; None for as many as JAX has devices.
      name: What it is called, within "memorized()".
    """

    def block(aval: jax.ShapeDtypeStruct) -> tuple[int, jax.ShapeDtypeStruct]:
        count = shards or jax.device_count()
        rows, n = aval.shape
        if rows % count:
            raise ValueError(
                f'reduce="local" cuts the rows into {count} equal blocks, which {rows} rows do not allow. Choose '
                "another batch size, or give shards=, such as the number of devices that the batch is spread over."
            )
        return count, jax.ShapeDtypeStruct((rows // count, n), aval.dtype)

    def init(aval: jax.ShapeDtypeStruct) -> State:
        count, own = block(aval)

        def spread(leaf: jax.Array) -> jax.Array:
            if _compat.is_key(leaf):
                return _base.split_keys(leaf, count)
            return jnp.broadcast_to(leaf, (count, *leaf.shape))

        return jax.tree.map(spread, sparsifier.init(own))

    def apply(g: jax.Array, state: State) -> tuple[Format, State]:
        count, own = block(jax.ShapeDtypeStruct(g.shape, g.dtype))
        p, state = jax.vmap(sparsifier.apply)(g.reshape(count, *own.shape), state)
        if isinstance(p, Columns):
            whole = p.values.shape[1] * p.rows_per_group
            if whole != own.shape[0]:
                raise ValueError(
                    f'reduce="local" needs blocks of whole groups: {p.rows_per_group} rows share a choice, and a block '
                    f"has {own.shape[0]} rows. Choose rows_per_group so that it divides them, or None."
                )
            return dataclasses.replace(
                p,
                values=p.values.reshape(-1, *p.values.shape[2:]),
                index=p.index.reshape(-1, p.kept_per_group),
                scale=None if p.scale is None else p.scale.reshape(-1),
                shape=(g.shape[0], g.shape[1]),
            ), state
        return Dense(p.values.reshape(g.shape)), state

    by_example = sparsifier.per_example
    return Sparsifier(
        init=init,
        apply=apply,
        name=f"memorized({name})",
        is_identity=sparsifier.is_identity,
        per_example=by_example and (lambda rows: _in_shards(by_example(rows), shards, name)),
        per_shard=sparsifier,
    )
