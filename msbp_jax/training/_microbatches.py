"""Gradient accumulation: one gradient from several microbatches, the memory threaded through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._checks import is_array, path_name, positive_int
from msbp_jax.formats import accumulation_dtype


class Step(NamedTuple):
    """What one microbatch, or all of them, give.

    Attributes:
      value: The loss.
      aux: What the loss function returns besides, stacked over the microbatches.
      grads: Gradients of the parameters.
      memory: The new memory.
      carried: Anything else that goes from one microbatch to the next.
    """

    value: Any
    aux: Any
    grads: Any
    memory: Any
    carried: Any


def check_microbatches(microbatches: int | None) -> int | None:
    """Return a checked number of microbatches; None is one batch."""
    if microbatches is None:
        return None
    return positive_int("microbatches", microbatches, "equal parts into which each batch is cut")


def in_microbatches(
    step: Callable[..., Step],
    count: int | None,
    params: Any,
    memory: Any,
    carried: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Step:
    """Return a step over consecutive parts of a batch: means of losses and gradients, the last memory.

    Args:
      step: `step(params, memory, carried, args, kwargs)` for one part.
      count: How many parts; None for the whole batch at once.
      params: Parameters.
      memory: What the first part sees.
      carried: Likewise.
      args: Arrays are cut along their leading axis; a PRNG key without axes is split; the rest is passed on.
      kwargs: Likewise.

    Raises:
      ValueError: The leading axis of an array is not a multiple of `count`.
    """
    if count is None:
        return step(params, memory, carried, args, kwargs)
    leaves, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
    cut = [_is_cut(leaf) for _, leaf in leaves]
    parts = [_parts(path, leaf, count) for (path, leaf), is_cut in zip(leaves, cut, strict=True) if is_cut]

    def one(carry: tuple[Any, Any, Any], part: list[jax.Array]) -> tuple[tuple[Any, Any, Any], tuple[Any, Any]]:
        memory, carried, total = carry
        own = iter(part)
        filled = [next(own) if is_cut else leaf for (_, leaf), is_cut in zip(leaves, cut, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, filled)
        result = step(params, memory, carried, args, kwargs)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, result.grads)
        return (result.memory, result.carried, total), (result.value, result.aux)

    nothing = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulation_dtype(p.dtype)), params)
    (memory, carried, total), (values, aux) = jax.lax.scan(one, (memory, carried, nothing), parts, length=count)
    grads = jax.tree.map(lambda t, p: (t / count).astype(p.dtype), total, params)
    return Step(values.mean(axis=0), aux, grads, memory, carried)


def _is_cut(leaf: Any) -> bool:
    return is_array(leaf) and (leaf.ndim > 0 or _compat.is_key(leaf))


def _parts(path: Any, leaf: Any, count: int) -> jax.Array:
    if leaf.ndim == 0:
        return jax.random.split(leaf, count)
    if leaf.shape[0] % count:
        raise ValueError(
            f"microbatches={count} cuts each array along its leading axis, but argument {path_name(path[1:])} has "
            f"shape {leaf.shape}. Choose a number that divides {leaf.shape[0]}, or close over what is no part of the "
            "batch."
        )
    return jnp.reshape(leaf, (count, leaf.shape[0] // count, *leaf.shape[1:]))
