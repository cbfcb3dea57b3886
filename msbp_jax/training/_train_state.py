"""Flax's train state with a memory in it, and the step that goes with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.training.train_state
import jax
import optax

from msbp_jax.training._value_and_grad import value_and_grad


class TrainState(flax.training.train_state.TrainState):
    """Flax's `TrainState` with the memory beside the parameters.

    Attributes:
      memory: What `init_memory` returned, then what each step returns. Keyword `memory=` of `create` and of
        `apply_gradients` sets it; without it `apply_gradients` leaves it as it was.

    Example:
      >>> import jax, jax.numpy as jnp, optax, msbp_jax as msbp
      >>> f = msbp.sparse_vjp(lambda p, x: x @ p["w"], msbp.memorized(msbp.top_k(k=8), decay=0.8))
      >>> p, x = {"w": jnp.ones((4, 64))}, jnp.ones((2, 4))
      >>> state = msbp.TrainState.create(apply_fn=f, params=p, tx=optax.sgd(0.1), memory=f.init_memory(p, x))
    """

    memory: Any = None


def train_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation | None = None, *, has_aux: bool = False
) -> Callable[..., tuple[TrainState, Any]]:
    """Return a compiled training step over a `TrainState`.

    Args:
      loss_fn: `loss_fn(params, memory, *args)`, as for `value_and_grad`.
      tx: The optimizer whose state is `state.opt_state`; None takes `state.tx`.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.

    Returns:
      `step(state, *args) -> (state, loss)`, or `(state, (loss, aux))`. It is jit-compiled and donates the old state's
      buffers: use the new state only.

    Example:
      >>> import jax, jax.numpy as jnp, optax, msbp_jax as msbp
      >>> f = msbp.sparse_vjp(lambda p, x: x @ p["w"], msbp.memorized(msbp.top_k(k=8), decay=0.8))
      >>> p, x = {"w": jnp.ones((4, 64))}, jnp.ones((2, 4))
      >>> state = msbp.TrainState.create(apply_fn=f, params=p, tx=optax.sgd(0.1), memory=f.init_memory(p, x))
      >>> step = msbp.train_step(lambda p, memory, x: (f(p, x, memory=memory) ** 2).mean())
      >>> state, loss = step(state, x)
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, *args: Any) -> tuple[TrainState, Any]:
        value, grads, memory = value_and_grad(loss_fn, has_aux=has_aux)(state.params, state.memory, *args)
        if tx is None:
            return state.apply_gradients(grads=grads, memory=memory), value
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, memory=memory), value

    return step
