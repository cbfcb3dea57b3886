"""The demo's network and its loss, dense or sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import msbp_jax as msbp


class MLP(nn.Module):
    """Hidden layers of one width with relu, and ten classes.

    Attributes:
      width: Features of each hidden layer.
      depth: Hidden layers.
    """

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch pixels"]) -> Float[Array, "batch 10"]:
        """Return logits."""
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


Gradients = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any, Any]]


def loss_and_gradients(
    module: MLP, sparsifier: msbp.Sparsifier | None, params: Any, x: Any
) -> tuple[Gradients, Any, msbp.Report | None]:
    """Return a function `(params, memory, x, y) -> (loss, grads, memory)`, the memory at the start, and the report.

    Args:
      module: The network.
      sparsifier: What its backward propagates; None for plain JAX, which has no memory and no report.
      params: Its parameters.
      x: One batch, or its shape.
    """

    def loss_of(logits: Any, y: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    if sparsifier is None:

        def plain(params: Any, memory: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any, Any]:
            loss, grads = jax.value_and_grad(lambda p: loss_of(module.apply({"params": p}, x), y))(params)
            return loss, grads, memory

        return plain, {}, None

    model = msbp.sparse_vjp(module, sparsifier)

    def loss_fn(params: Any, memory: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss_of(model.apply({"params": params}, x, memory=memory), y)

    variables = {"params": params}
    return msbp.value_and_grad(loss_fn), model.init_memory(variables, x), model.report(variables, x)
