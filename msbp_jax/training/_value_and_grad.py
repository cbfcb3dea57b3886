"""`value_and_grad`: loss, gradients, and the memory that comes out of the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._checks import check_parameters
from msbp_jax.rules import Tracker
from msbp_jax.training._microbatches import Step, check_microbatches, in_microbatches


def value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, microbatches: int | None = None
) -> Callable[..., Any]:
    """Turn a loss into a function that returns its value, its gradients and the new memory.

    Args:
      loss_fn: `loss_fn(params, memory, *args, **kwargs)`, returning a real scalar, or `(scalar, aux)` with `has_aux`.
        It passes the memory on to the wrapped models it calls.
      has_aux: Whether `loss_fn` returns something besides the loss.
      microbatches: Into how many equal parts to cut the batch, one backward each: every array in `args` and `kwargs` is
        cut along its leading axis, a PRNG key is split, and anything else is passed on. Losses and gradients are the
        means over the parts, `aux` is stacked, and the memory goes from one part to the next.

    Returns:
      A function of the same arguments that returns `(loss, grads, memory)`, or `((loss, aux), grads, memory)`. `grads`
      has the structure of `params`. `memory` may be any pytree that holds the memories of any number of wrapped models;
      sites that the step does not reach keep theirs. If one memory is used in several calls, the new one is the mean
      of theirs. It is a pure function: jit, scan or vmap it.

    Raises:
      TypeError: `params` are not floating arrays; the loss is not a real scalar.
      ValueError: `params` has no leaves; `microbatches` does not divide a leading axis.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=8), decay=0.8))
      >>> w, x = jnp.ones((4, 64)), jnp.ones((2, 4))
      >>> loss_fn = lambda w, memory, x: (f(w, x, memory=memory) ** 2).mean()
      >>> loss, grads, memory = msbp.value_and_grad(loss_fn)(w, f.init_memory(w, x), x)
    """
    count = check_microbatches(microbatches)

    def step(params: Any, memory: Any, carried: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        value, grads, memory, _ = differentiate(loss_fn, has_aux, Tracker(), params, memory, args, kwargs)
        value, aux = value if has_aux else (value, None)
        return Step(value, aux, grads, memory, carried)

    @functools.wraps(loss_fn)
    def wrapped(params: Any, memory: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        done = in_microbatches(step, count, params, memory, None, args, kwargs)
        return ((done.value, done.aux) if has_aux else done.value), done.grads, done.memory

    return wrapped


def differentiate(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    tracker: Tracker,
    params: Any,
    memory: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Any, Any, dict[Any, Any]]:
    """Return (value, gradients, memory, everything the rules logged); see `value_and_grad`."""
    check_parameters(jax.tree_util.tree_flatten_with_path(params)[0])
    marked = tracker.mark(memory)

    def loss(params: Any) -> Any:
        result = loss_fn(params, marked, *args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"With has_aux=True the loss function must return (loss, aux), got {type(result).__name__}."
            )
        _check_loss(result[0] if has_aux else result)
        return result

    try:
        if has_aux:
            loss_value, pullback, aux = jax.vjp(loss, params, has_aux=True)
        else:
            loss_value, pullback = jax.vjp(loss, params)
        (grads,), logs = _compat.pull_back_with_logs(pullback, jnp.ones_like(loss_value))
    except ValueError as error:
        if "Duplicate backward-pass log key" not in str(error):
            raise
        raise ValueError(
            "One memory went through the same jit-compiled function more than once in one loss, so that two new "
            "memories bear one name. Call the wrapped model directly (jit the whole step instead), or keep a memory "
            "for each call."
        ) from error
    if tracker.marks and not tracker.sites:
        raise ValueError(
            "loss_fn passed its memory to no wrapped model, so that the backward was dense. Call the models of "
            "sparse_vjp with memory=memory inside loss_fn."
        )
    return (loss_value, aux) if has_aux else loss_value, grads, tracker.collect(memory, logs), logs


def _check_loss(loss: Any) -> None:
    shape, dtype = jnp.shape(loss), jnp.result_type(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"The loss must be a real scalar, got shape {shape} and dtype {dtype}. Reduce it, for example with "
            ".mean(); if it comes with something else, pass has_aux=True."
        )
