"""Gradient accumulation: one gradient from several microbatches, the memory threaded through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax import _compat
from msbp_jax._checks import is_array, is_differentiable, path_name, positive_int
from msbp_jax.carriers import OVERWRITE_WITH_GRADIENT
from msbp_jax.formats import accumulation_dtype
from msbp_jax.weights import is_pattern


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
      carried: What the first part sees of anything else that goes from part to part.
      args: Arrays are cut along their leading axis; a PRNG key without axes is split, a legacy one (of the shape and
        dtype of `jax.random.PRNGKey`'s) too; patterns of sparse weights, and the rest, are passed on.
      kwargs: Keyword arguments, cut as `args` are.

    Of a collection that is overwritten with its "gradient" (Flax's statistics of float8 products) the last part's
    counts, and each part sees what the one before it left.

    Raises:
      ValueError: The leading axis of an array is not a multiple of `count`.
    """
    if count is None:
        return step(params, memory, carried, args, kwargs)
    leaves, structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_pattern)
    cut = [_is_cut(leaf) for _, leaf in leaves]
    parts = [_parts(path, leaf, count) for (path, leaf), is_cut in zip(leaves, cut, strict=True) if is_cut]

    trained, overwritten = _apart(params)

    def body(carry: tuple[Any, Any, Any, Any], part: list[jax.Array]) -> tuple[Any, tuple[Any, Any]]:
        memory, carried, total, overwritten = carry
        cut_leaves = iter(part)
        filled = [next(cut_leaves) if is_cut else leaf for (_, leaf), is_cut in zip(leaves, cut, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, filled)
        result = step(_together(trained, overwritten), memory, carried, args, kwargs)
        grads, overwritten = _apart(result.grads)
        numbers = [g for g in jax.tree.leaves(grads) if not _is_constant(g)]
        total = [t + g.astype(t.dtype) for t, g in zip(total, numbers, strict=True)]
        return (result.memory, result.carried, total, overwritten), (result.value, result.aux)

    every, shape = jax.tree.flatten(trained)
    numbers = [leaf for leaf in every if is_differentiable(leaf)]
    nothing = [jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype)) for leaf in numbers]
    start = memory, carried, nothing, overwritten
    (memory, carried, total, overwritten), (values, aux) = jax.lax.scan(body, start, parts, length=count)
    means = iter([(t / count).astype(leaf.dtype) for t, leaf in zip(total, numbers, strict=True)])
    grads = jax.tree.unflatten(shape, [next(means) if is_differentiable(leaf) else no_gradient(leaf) for leaf in every])
    return Step(values.mean(axis=0), aux, _together(grads, overwritten), memory, carried)


def _apart(params: Any) -> tuple[Any, Any]:
    """Return parameters without the collection that is overwritten, and that collection; None where there is none."""
    if not isinstance(params, Mapping) or OVERWRITE_WITH_GRADIENT not in params:
        return params, None
    others = {name: tree for name, tree in params.items() if name != OVERWRITE_WITH_GRADIENT}
    return others, params[OVERWRITE_WITH_GRADIENT]


def _together(params: Any, overwritten: Any) -> Any:
    return params if overwritten is None else {**params, OVERWRITE_WITH_GRADIENT: overwritten}


def no_gradient(leaf: Any) -> np.ndarray:
    """Return what JAX has for the gradient of an array without fractions: zeros of dtype float0."""
    return np.zeros(np.shape(leaf), jax.dtypes.float0)


def _is_constant(gradient: Any) -> bool:
    return gradient.dtype == jax.dtypes.float0


def _is_cut(leaf: Any) -> bool:
    return is_array(leaf) and (leaf.ndim > 0 or _compat.is_key(leaf))


def _is_legacy_key(leaf: Any) -> bool:
    """Whether an array is a PRNG key as JAX had them before they got a type: nothing but shape and dtype tells."""
    return leaf.dtype == jnp.uint32 and leaf.shape == jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape


def _parts(path: Any, leaf: Any, count: int) -> jax.Array:
    if leaf.ndim == 0 or _is_legacy_key(leaf):
        return jax.random.split(leaf, count)
    if leaf.shape[0] % count:
        raise ValueError(
            f"microbatches={count} cuts each array along its leading axis, but argument {path_name(path[1:])} has "
            f"shape {leaf.shape}. Choose a number that divides {leaf.shape[0]}, or close over what is no part of the "
            "batch."
        )
    return jnp.reshape(leaf, (count, leaf.shape[0] // count, *leaf.shape[1:]))
