"""Wrappers that return a sparsifier: what is not propagated in a step is remembered and used in the next ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _checks, _compat
from msbp_jax.formats import Dense, Format
from msbp_jax.kernels.residual import add_memory, left_of, takes_part
from msbp_jax.sparsifiers import EntriesState, QuantizedState, RandomKState, SampledRowsState, Sparsifier
from msbp_jax.sparsifiers._base import State, Weighted, serving
from msbp_jax.sparsifiers._keys import split_keys
from msbp_jax.sparsifiers._weighted import apply_weighted, settled
from msbp_jax.sparsifiers._where import Stays, Where


class MemorizedState(NamedTuple):
    """State of a memorized sparsifier.

    Attributes:
      residual: What was not propagated, float32, 0 at the start: `[n]` for `reduce="mean"`, `[rows, n]` for `"slot"`.
      inner: State of the wrapped sparsifier.
    """

    residual: jax.Array
    inner: State

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """The Euclidean norm of the residual, over all instances, for `msbp.metrics` and `msbp.diagnose`."""
        return {"memory_norm": jnp.sqrt(jnp.square(jnp.asarray(self.residual)).sum())}


class ScheduledState(NamedTuple):
    """Inner state of a memorized sparsifier whose decay is a schedule.

    Attributes:
      step: How many steps the site has seen, float32, `[]`.
      inner: State of the wrapped sparsifier.
    """

    step: jax.Array
    inner: State


_compat.serializable(MemorizedState)
_compat.serializable(ScheduledState)

type Schedule = Callable[[Any], Any]


def memorized(
    sparsifier: Sparsifier,
    decay: float | Schedule,
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
      decay: How much of the residual is carried on, in [0, 1]; the paper's memory ratio. `decay=0` is `S` itself. Or a
        schedule such as Optax's, from the number of steps that the site has seen to such a number.
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
    meaning = "share of the residual that is carried on; or a schedule"
    ratio = decay if callable(decay) else _checks.fraction("decay", decay, zero=True, meaning=meaning)
    if reduce not in ("mean", "slot", "local"):
        raise ValueError(
            f'reduce must be "mean" (one memory of [n]), "slot" (one of [rows, n]) or "local" (one of [n] for each '
            f"shard of the batch), got {reduce!r}."
        )
    if shards is not None:
        if reduce != "local":
            raise ValueError(f'shards={shards!r} is for reduce="local", got reduce={reduce!r}. Leave it out.')
        _checks.positive_int("shards", shards, "blocks of rows with a memory each")
    if not sparsifier.remembers:
        raise ValueError(
            f"memorized remembers what a sparsifier leaves out, got {sparsifier}, which is unbiased: on the "
            "average, nothing is left to remember. Use it without memorized; a memory goes with columns chosen within "
            'the rows that are left: {"@outputs": sample_rows(...), "*": memorized(top_k(...), ...)}.'
        )
    if isinstance(getattr(sparsifier.apply, "__self__", None), _Memorized | _Shards):
        raise _has_a_memory(sparsifier)
    if ratio == 0:
        return sparsifier
    if reduce != "local":
        return _Memorized(sparsifier, ratio, reduce == "slot").sparsifier()
    return _Shards(_Memorized(sparsifier, ratio, by_slot=False), shards).sparsifier()


@dataclasses.dataclass(frozen=True)
class _Memorized:
    inner: Sparsifier
    decay: float | Schedule
    by_slot: bool

    def sparsifier(self) -> Sparsifier:
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=self.name('reduce="slot"' if self.by_slot else ""),
            at=self.at,
            weighted=self.weighted,
            per_device=self.inner.per_device,
            wants=self.inner.wants,
        )

    def name(self, *settings: str) -> str:
        decay = "schedule" if callable(self.decay) else f"{self.decay:g}"
        return f"memorized({', '.join(filter(None, (self.inner.name, f'decay={decay}', *settings)))})"

    def at(self, where: Where) -> Sparsifier | Stays:
        inner = serving(self.inner, where)
        return inner if isinstance(inner, Stays) else dataclasses.replace(self, inner=inner).sparsifier()

    def init(self, aval: jax.ShapeDtypeStruct) -> MemorizedState:
        shape = aval.shape if self.by_slot else aval.shape[1:]
        inner = self.inner.init(aval)
        if any(isinstance(node, MemorizedState) for node in jax.tree.leaves(inner, is_leaf=_is_memory)):
            raise _has_a_memory(self.inner)
        if callable(self.decay):
            inner = ScheduledState(jnp.zeros((), jnp.float32), inner)
        return MemorizedState(jnp.zeros(shape, jnp.float32), inner)

    def apply(self, g: jax.Array, state: MemorizedState, **seen: jax.Array) -> tuple[Format, MemorizedState]:
        p, total, weight = self.weighted(g, state, **seen)
        return p, settled(state, total, weight)

    def weighted(self, g: jax.Array, state: MemorizedState, **seen: jax.Array) -> Weighted:
        p: Format
        inner = state.inner.inner if callable(self.decay) else state.inner
        if self.inner.with_memory is not None and g.shape[0] != 0:
            p, left, rows = self.inner.with_memory(g, state.residual)
            total, weight = inner, inner
        else:
            live = takes_part(g)
            u = add_memory(g, state.residual, live)
            p, total, weight = apply_weighted(self.inner, u, inner, live, **seen)
            left, rows = left_of(u, p, live, by_slot=self.by_slot)
            p = p.astype(g.dtype)
        decay: Any = self.decay
        if callable(self.decay):
            step, count = state.inner.step, rows.sum()
            decay = self.decay(step)
            total, weight = ScheduledState((step + 1) * count, total), ScheduledState(count, weight)
        left = jnp.asarray(decay, left.dtype) * left
        return Weighted(p, MemorizedState(left, total), MemorizedState(rows, weight))


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
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=self.block.name('reduce="local"'),
            at=self.at,
            weighted=self.weighted,
            wants=self.block.inner.wants,
        )

    def at(self, where: Where) -> Sparsifier | Stays:
        if where.on_devices:  # each device is a block with a state of its own
            block = self.block.at(where)
            return block if isinstance(block, Stays) else block._replace(per_device=True)
        inner = serving(self.block.inner, where)
        if isinstance(inner, Stays):
            return inner
        return dataclasses.replace(self, block=dataclasses.replace(self.block, inner=inner)).sparsifier()

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
        count, block_aval = self.blocks_of(aval)

        def spread(leaf: jax.Array) -> jax.Array:
            return split_keys(leaf, count) if _compat.is_key(leaf) else jnp.broadcast_to(leaf, (count, *leaf.shape))

        return jax.tree.map(spread, self.inner.init(block_aval))

    def apply(self, g: jax.Array, state: State, **seen: jax.Array) -> tuple[Format, State]:
        p, total, weight = self.weighted(g, state, **seen)
        return p, settled(state, total, weight)

    def weighted(self, g: jax.Array, state: State, **seen: jax.Array) -> Weighted:
        count, block_aval = self.blocks_of(g)
        by_block = {name: norms.reshape(count, -1) if name == "input_norms" else norms for name, norms in seen.items()}
        axes = {name: 0 if name == "input_norms" else None for name in seen}
        apply = lambda g, state, seen: tuple(apply_weighted(self.inner, g, state, **seen))
        p, total, weight = jax.vmap(apply, in_axes=(0, 0, axes))(g.reshape(count, *block_aval.shape), state, by_block)
        joined = p.joined(g.shape) or Dense(jax.vmap(lambda p: p.materialize())(p).reshape(g.shape))
        return Weighted(joined, total, weight)


def check_no_states(params: Any) -> None:
    """Raise if states of sparsifiers stand among parameters.

    Raises:
      TypeError: They do.
    """
    is_state = lambda node: isinstance(node, _STATES)
    if any(map(is_state, jax.tree.leaves(params, is_leaf=is_state))):
        raise TypeError(
            "The parameters hold states of sparsifiers, which belong into a memory. Were params and memory swapped? "
            'The order is (params, memory, ...), and model.apply({"params": params}, ..., memory=memory).'
        )


_STATES = MemorizedState | RandomKState | SampledRowsState | EntriesState | QuantizedState


def _is_memory(node: Any) -> bool:
    return isinstance(node, MemorizedState)


def _has_a_memory(sparsifier: Sparsifier) -> ValueError:
    return ValueError(
        f"memorized wraps a sparsifier without a memory, got {sparsifier}. What the inner memory adds would be "
        "taken for a part of the gradient, and remembered twice. Keep one memorized(), the outermost."
    )
