"""Wrappers that return a sparsifier: what is not propagated in a step is remembered and used in the next ones."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _checks, _compat
from msbp_jax.formats import Dense, Format
from msbp_jax.kernels._residual import add_memory, left_of, takes_part
from msbp_jax.sparsifiers import RandomKState, Sparsifier
from msbp_jax.sparsifiers._base import State, Weighted
from msbp_jax.sparsifiers._keys import split_keys
from msbp_jax.sparsifiers._weighted import apply_weighted, settled


class MemorizedState(NamedTuple):
    """State of a memorized sparsifier.

    Attributes:
      residual: What was not propagated, float32, 0 at the start: `[n]` for `reduce="mean"`, `[rows, n]` for `"slot"`.
      inner: State of the wrapped sparsifier.
    """

    residual: jax.Array
    inner: State


_compat.serializable(MemorizedState)


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

    A row of `g` that is exactly 0 (padding, a masked label) takes no part: it gets no memory, is not counted in the
    mean, and keeps its slot as it was. So a padded batch makes the memory that it makes without its padding, whatever
    stands in it. Where nothing takes part, the memory stays.

    Args:
      sparsifier: `S`, any sparsifier without a memory.
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
      ValueError: `decay` outside [0, 1], an unknown `reduce`, `shards` without `reduce="local"`, a sparsifier that has
        a memory already; later, rows that cannot be cut into `shards` blocks of whole groups.
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
    for inner in (sparsifier, sparsifier.per_shard):
        if inner is not None and isinstance(getattr(inner.apply, "__self__", None), _Memorized | _Shards):
            raise _has_a_memory(sparsifier)
    if ratio == 0:
        return sparsifier
    if reduce != "local":
        return _Memorized(sparsifier, ratio, reduce == "slot").sparsifier()
    return _Shards(_Memorized(sparsifier, ratio, by_slot=False), shards).sparsifier()


@dataclasses.dataclass(frozen=True)
class _Memorized:
    inner: Sparsifier
    decay: float
    by_slot: bool

    def sparsifier(self) -> Sparsifier:
        inner = self.inner
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=f"memorized({inner.name}, decay={self.decay:g}{', reduce="slot"' if self.by_slot else ''})",
            is_identity=inner.is_identity,
            per_example=None if inner.per_example is None else self.per_example,
            per_shard=None
            if inner.per_shard is None
            else dataclasses.replace(self, inner=inner.per_shard).sparsifier(),
            weighted=self.weighted,
        )

    def init(self, aval: jax.ShapeDtypeStruct) -> MemorizedState:
        shape = aval.shape if self.by_slot else aval.shape[1:]
        inner = self.inner.init(aval)
        if any(isinstance(node, MemorizedState) for node in jax.tree.leaves(inner, is_leaf=_is_memory)):
            raise _has_a_memory(self.inner)
        return MemorizedState(jnp.zeros(shape, jnp.float32), inner)

    def apply(self, g: jax.Array, state: MemorizedState) -> tuple[Format, MemorizedState]:
        p, total, weight = self.weighted(g, state)
        return p, settled(state, total, weight)

    def weighted(self, g: jax.Array, state: MemorizedState) -> Weighted:
        p: Format
        if self.inner.with_memory is not None and g.shape[0] != 0:
            p, left, rows = self.inner.with_memory(g, state.residual)
            total, weight = state.inner, state.inner
        else:
            live = takes_part(g)
            u = add_memory(g, state.residual, live)
            p, total, weight = apply_weighted(self.inner, u, state.inner, live)
            left, rows = left_of(u, p, live, by_slot=self.by_slot)
            p = p.astype(g.dtype)
        left = jnp.asarray(self.decay, left.dtype) * left
        return Weighted(p, MemorizedState(left, total), MemorizedState(rows, weight))

    def per_example(self, rows: int) -> Sparsifier:
        assert self.inner.per_example is not None
        return dataclasses.replace(self, inner=self.inner.per_example(rows)).sparsifier()


@dataclasses.dataclass(frozen=True)
class _Shards:
    """A memory for each of equal blocks of consecutive rows, which are treated each for itself.

    Attributes:
      block: What treats a block.
      shards: How many; None for as many as JAX has devices.
    """

    block: _Memorized
    shards: int | None

    @property
    def inner(self) -> Sparsifier:
        """What treats a block, as a sparsifier."""
        return self.block.sparsifier()

    def sparsifier(self) -> Sparsifier:
        own = self.inner
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=f'memorized({self.block.inner.name}, decay={self.block.decay:g}, reduce="local")',
            is_identity=own.is_identity,
            per_example=None if own.per_example is None else self.per_example,
            per_shard=own.per_shard or own,
            weighted=self.weighted,
        )

    def blocks_of(self, aval: Any) -> tuple[int, jax.ShapeDtypeStruct]:
        """Return how many blocks there are, and what one looks like."""
        count = self.shards or jax.device_count()
        rows, n = aval.shape
        if rows % count:
            raise ValueError(
                f'reduce="local" cuts the rows into {count} equal blocks, which {rows} rows do not allow. Choose '
                "another batch size, or give shards=, such as the number of devices that the batch is spread over."
            )
        return count, jax.ShapeDtypeStruct((rows // count, n), aval.dtype)

    def init(self, aval: jax.ShapeDtypeStruct) -> State:
        count, own = self.blocks_of(aval)

        def spread(leaf: jax.Array) -> jax.Array:
            return split_keys(leaf, count) if _compat.is_key(leaf) else jnp.broadcast_to(leaf, (count, *leaf.shape))

        return jax.tree.map(spread, self.inner.init(own))

    def apply(self, g: jax.Array, state: State) -> tuple[Format, State]:
        p, total, weight = self.weighted(g, state)
        return p, settled(state, total, weight)

    def weighted(self, g: jax.Array, state: State) -> Weighted:
        count, own = self.blocks_of(g)
        blocks = g.reshape(count, *own.shape)
        p, total, weight = jax.vmap(lambda g, state: tuple(apply_weighted(self.inner, g, state)))(blocks, state)
        joined = p.joined(g.shape) or Dense(jax.vmap(lambda own: own.materialize())(p).reshape(g.shape))
        return Weighted(joined, total, weight)

    def per_example(self, rows: int) -> Sparsifier:
        assert self.block.inner.per_example is not None
        block = dataclasses.replace(self.block, inner=self.block.inner.per_example(rows))
        return dataclasses.replace(self, block=block).sparsifier()


def check_no_states(params: Any) -> None:
    """Raise if states of sparsifiers stand among parameters.

    Raises:
      TypeError: They do.
    """
    is_state = lambda node: isinstance(node, MemorizedState | RandomKState)
    if any(map(is_state, jax.tree.leaves(params, is_leaf=is_state))):
        raise TypeError(
            "The parameters hold states of sparsifiers, which belong into a memory. Were params and memory swapped? "
            'The order is (params, memory, ...), and model.apply({"params": params}, ..., memory=memory).'
        )


def _is_memory(node: Any) -> bool:
    return isinstance(node, MemorizedState)


def _has_a_memory(sparsifier: Sparsifier) -> ValueError:
    return ValueError(
        f"memorized wraps a sparsifier without a memory, got {sparsifier}. What the inner memory adds would be "
        "taken for a part of the gradient, and remembered twice. Keep one memorized(), the outermost."
    )
