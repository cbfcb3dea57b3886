"""`value_and_grad`: loss, gradients, and the memory that comes out of the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax import _compat
from msbp_jax._checks import check_parameters, is_differentiable
from msbp_jax.carriers import Observer, Passage, plain
from msbp_jax.kernels.xla.schedule import all_at_once
from msbp_jax.memory import check_no_states
from msbp_jax.training._microbatches import Step, check_microbatches, in_microbatches, no_gradient
from msbp_jax.transform import SparseNNXModule


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
        means over the parts, `aux` is stacked, and the memory goes from one part to the next. The parts are a
        `lax.scan`, which JAX compiles anew at every call outside of `jax.jit`.

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
        value, grads, memory, _ = differentiate(loss_fn, has_aux, None, params, memory, args, kwargs)
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
    observer: Observer | None,
    params: Any,
    memory: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Any, Any, dict[Any, Any]]:
    """Return (value, gradients, memory, everything the rules logged); see `value_and_grad`."""
    _check_arguments(params)
    check_parameters(jax.tree_util.tree_flatten_with_path(params)[0])
    passage = Passage(memory, observer)
    unused: list[bool] = []
    leaves, structure = jax.tree.flatten(params)
    numbers = [leaf for leaf in leaves if is_differentiable(leaf)]

    def loss(numbers: list[Any], carriers: Any) -> Any:
        filled = iter(numbers)
        merged = [next(filled) if is_differentiable(leaf) else leaf for leaf in leaves]
        result = loss_fn(jax.tree.unflatten(structure, merged), passage.marked(carriers), *args, **kwargs)
        unused.append(passage.unused)
        check_result(result, has_aux)
        value, aux = result if has_aux else (result, None)
        check_loss(value)
        return jnp.asarray(value), plain(aux)

    try:
        value, pullback, aux = jax.vjp(loss, numbers, passage.carriers, has_aux=True)
        (grads, returned), logs = _compat.pull_back_with_logs(pullback, jnp.ones_like(value))
    except ValueError as error:
        if "Duplicate backward-pass log key" not in str(error):
            raise
        raise ValueError(
            "msbp.diagnose tells the uses of a site apart as it traces them, and one compiled function went into this "
            "loss more than once. Call the wrapped model directly."
        ) from error
    returned = passage.of_sites(returned)
    grads, returned = all_at_once((grads, returned)) if returned else (grads, returned)
    if unused[-1] and passage.taken_over:
        raise ValueError(
            "loss_fn passed its memory to another msbp.value_and_grad alone, which returns the new one itself. "
            "Differentiate it with jax.value_and_grad(..., has_aux=True), and return that memory as aux."
        )
    if unused[-1]:
        raise ValueError(
            "loss_fn passed its memory to no wrapped model, so that the backward was dense. Call the models of "
            "sparse_vjp with memory=memory inside loss_fn."
        )
    found = iter(grads)
    every = [next(found) if is_differentiable(leaf) else no_gradient(leaf) for leaf in leaves]
    gradients = jax.tree.unflatten(structure, every)
    return (value, aux) if has_aux else value, gradients, passage.collected(returned), logs


def _check_arguments(params: Any) -> None:
    if isinstance(params, SparseNNXModule):
        raise TypeError(
            "msbp.value_and_grad takes parameters and memory apart, got an NNX model: use "
            "msbp.nnx.value_and_grad(loss_fn)(model, ...), whose model holds both."
        )
    check_no_states(params)


def check_result(result: Any, has_aux: bool) -> None:
    """Raise unless a loss function returned a pair where it says so.

    Raises:
      TypeError: It did not.
    """
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"With has_aux=True the loss function must return (loss, aux), got {type(result).__name__}.")


def check_loss(loss: Any) -> None:
    """Raise unless a loss is a real scalar.

    Raises:
      TypeError: It is not.
    """
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float):
        raise TypeError(
            f"The loss must be a real scalar, got {type(loss).__name__}. If the loss function returns something "
            "besides the loss, return (loss, aux) and pass has_aux=True."
        )
    shape, dtype = jnp.shape(loss), jnp.result_type(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"The loss must be a real scalar, got shape {shape} and dtype {dtype}. Reduce it, for example with "
            ".mean(); if it comes with something else, pass has_aux=True."
        )
