"""Flax's train state with a memory in it, and the step that goes with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import flax.training.train_state
import jax
import jax.numpy as jnp
import optax

from msbp_jax import _compat
from msbp_jax._checks import is_array, path_name
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

    memory: Any = flax.struct.field(default=None, kw_only=True)  # a subclass may add fields without default

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: optax.GradientTransformation, **kwargs: Any) -> Self:
        """Return the state at the start, as Flax's does.

        Args:
          apply_fn: For the user's own steps; None will do.
          params: Parameters.
          tx: The optimizer.
          **kwargs: Further fields, `memory` for example.

        Raises:
          TypeError: A PRNG key stands among the parameters, which no optimizer takes.
        """
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            if is_array(leaf) and _compat.is_key(leaf):
                raise TypeError(
                    f"Parameter {path_name(path)} is a PRNG key, which no optimizer takes. Keep it in a field of its "
                    "own, in a subclass of msbp.TrainState, and pass it to the loss."
                )
        return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """Return the state after a step of the optimizer, as Flax's does; arrays without fractions stay as they are.

        Args:
          grads: Gradients of the structure of `params`.
          **kwargs: Further fields to replace, `memory` for example.
        """
        have_gradients = jax.tree.map(lambda g: g.dtype != jax.dtypes.float0, grads)
        filled = jax.tree.map(lambda g, has: g if has else jnp.zeros(g.shape, jnp.float32), grads, have_gradients)
        after = super().apply_gradients(grads=filled, **kwargs)
        kept = jax.tree.map(lambda new, old, has: new if has else old, after.params, self.params, have_gradients)
        return after.replace(params=kept)


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
        if not isinstance(state, TrainState):
            raise TypeError(
                f"The step takes a msbp.TrainState, which has a memory, got {type(state).__module__}."
                f"{type(state).__qualname__}. Make it with msbp.TrainState.create(apply_fn=..., params=..., tx=..., "
                "memory=model.init_memory(...))."
            )
        value, grads, memory = value_and_grad(loss_fn, has_aux=has_aux)(state.params, state.memory, *args)
        optimized = state if tx is None else state.replace(tx=tx)
        after = optimized.apply_gradients(grads=grads, memory=memory)
        return after.replace(tx=state.tx), value

    return step
