"""Training of NNX models: gradients out, and the memory updated where it lives, in `msbp.Memory` Variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from msbp_jax import training
from msbp_jax.training._microbatches import Step, check_microbatches, in_microbatches
from msbp_jax.transform import Memory


def value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, microbatches: int | None = None, wrt: Any = nnx.Param
) -> Callable[..., Any]:
    """Turn a loss of a model into a function that returns its value and gradients, and updates the model's memory.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs)`, returning a real scalar, or `(scalar, aux)` with `has_aux`. The model
        is, or holds, one or several that `sparse_vjp` made.
      has_aux: Whether `loss_fn` returns something besides the loss.
      microbatches: As for `msbp.value_and_grad`.
      wrt: An NNX filter: which Variables to differentiate. Of the others no gradient is computed.

    Returns:
      A function of the same arguments that returns `(loss, grads)`, or `((loss, aux), grads)`, like
      `nnx.value_and_grad`: `nnx.Optimizer.update(model, grads)` takes `grads`. The model's `msbp.Memory` takes on its
      new value, and other Variables change as the loss changes them. Call it inside `nnx.jit`.

    Raises:
      TypeError: The loss is not a real scalar.
      ValueError: No Variable is differentiated, or the loss calls no wrapped model.

    Example:
      >>> import jax.numpy as jnp, optax, msbp_jax as msbp
      >>> from flax import nnx
      >>> model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), msbp.memorized(msbp.top_k(k=4), decay=0.8))
      >>> x = jnp.ones((2, 8))
      >>> memory = model.init_memory(x)
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> loss, grads = msbp.nnx.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)
      >>> _ = optimizer.update(model, grads)
    """
    count = check_microbatches(microbatches)

    def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
        pure, params, memory, rest = _pure(loss_fn, has_aux, wrt, model)

        def step(params: Any, memory: Any, rest: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
            result = training.value_and_grad(pure, has_aux=True)(params, memory, rest, *args, **kwargs)
            (value, (aux, rest)), grads, memory = result
            return Step(value, aux, grads, memory, rest)

        done = in_microbatches(step, count, params, memory, rest, args, kwargs)
        nnx.update(model, done.memory, done.carried)
        return ((done.value, done.aux) if has_aux else done.value), done.grads

    return wrapped


def diagnose(loss_fn: Callable[..., Any], *, has_aux: bool = False, wrt: Any = nnx.Param) -> Callable[..., Any]:
    """Turn a loss of a model into a function that compares its sparse gradients with the true ones.

    Args:
      loss_fn: As for `value_and_grad`.
      has_aux: As for `value_and_grad`.
      wrt: As for `value_and_grad`.

    Returns:
      A function `(model, *args, **kwargs) -> msbp.Diagnosis`, which changes nothing; see `msbp.diagnose`.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> from flax import nnx
      >>> model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), msbp.memorized(msbp.top_k(k=16), decay=0.8))
      >>> x = jnp.ones((2, 8))
      >>> memory = model.init_memory(x)
      >>> diagnosis = msbp.nnx.diagnose(lambda model, x: (model(x) ** 2).mean())(model, x)
      >>> round(float(diagnosis.sites["kernel"].density), 2)
      0.25
    """

    def wrapped(model: Any, *args: Any, **kwargs: Any) -> training.Diagnosis:
        pure, params, memory, rest = _pure(loss_fn, has_aux, wrt, model)
        return training.diagnose(pure, has_aux=True)(params, memory, rest, *args, **kwargs)

    return wrapped


def _pure(loss_fn: Callable[..., Any], has_aux: bool, wrt: Any, model: Any) -> tuple[Callable[..., Any], Any, Any, Any]:
    """Return the loss as a pure function `(params, memory, rest, *args)`, and these parts of the model."""
    graphdef, *states = nnx.split(model, wrt, Memory, ...)
    params, memory, rest = states
    others = nnx.Not(nnx.Any(wrt, Memory))

    def pure(params: Any, memory: Any, rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, Any]]:
        own = nnx.merge(graphdef, params, memory, rest, copy=True)
        result = loss_fn(own, *args, **kwargs)
        value, aux = result if has_aux else (result, None)
        return value, (aux, nnx.state(own, others))

    return pure, params, memory, rest
