"""Gradients to measure on: Gaussian, heavy-tailed, and recorded from a network in training."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data import mnist
from msbp_jax.testing import random_gradient


def gaussian(rows: int, n: int) -> jax.Array:
    """Return independent normal entries, `[rows, n]`."""
    return jax.random.normal(jax.random.key(0), (rows, n))


def heavy_tailed(rows: int, n: int) -> jax.Array:
    """Return a normal times a log-normal, `[rows, n]`."""
    return random_gradient(0, rows, n)


class _Recorded(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width)(x))
        # What `perturb` adds is 0; its gradient is that of the layer's output.
        x = self.perturb("output", nn.Dense(self.width)(x))
        return nn.Dense(10)(nn.relu(x))


@functools.cache
def recorded(rows: int, n: int, folder: pathlib.Path | None = None, steps: int = 60) -> jax.Array:
    """Return the gradient of a hidden layer's output, `[rows, n]`, after some steps on MNIST, or on the digits.

    Args:
      rows: Examples.
      n: Width of the layer.
      folder: Where MNIST lies; None for scikit-learn's digits.
      steps: Steps of Adam before.
    """
    data = mnist.load(folder)
    train_x, train_y = data.train_x, data.train_y
    module, tx = _Recorded(n), optax.adam(1e-3)
    variables = module.init(jax.random.key(0), jnp.asarray(train_x[:rows]))
    params, zeros = variables["params"], jnp.zeros((rows, n))
    draw = np.random.default_rng(0)

    def loss(params: Any, output: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = module.apply({"params": params, "perturbations": {"output": output}}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Any, opt_state: optax.OptState, x: jax.Array, y: jax.Array) -> tuple[Any, optax.OptState]:
        updates, opt_state = tx.update(jax.grad(loss)(params, zeros[: len(x)], x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(steps):
        chosen = draw.integers(0, len(train_x), min(rows, 128))
        params, opt_state = step(params, opt_state, jnp.asarray(train_x[chosen]), jnp.asarray(train_y[chosen]))
    chosen = draw.integers(0, len(train_x), rows)
    return jax.jit(jax.grad(loss, argnums=1))(params, zeros, jnp.asarray(train_x[chosen]), jnp.asarray(train_y[chosen]))


KINDS = ("Gaussian", "heavy-tailed", "recorded")


def make(kind: str, rows: int, n: int, folder: pathlib.Path | None) -> jax.Array:
    """Return a gradient of one of `KINDS`."""
    if kind == "recorded":
        return recorded(rows, n, folder)
    return {"Gaussian": gaussian, "heavy-tailed": heavy_tailed}[kind](rows, n)
