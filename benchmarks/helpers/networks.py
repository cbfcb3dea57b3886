"""The networks of the step benchmarks, as losses of (params, memory, batch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import msbp_jax as msbp


class MLP(nn.Module):
    """`depth` linear layers: hidden ones of one width with relu, then ten classes."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for _ in range(self.depth - 1):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class Hidden(nn.Module):
    """Hidden layers of given widths, and ten classes."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


NERVA = Hidden((1024, 512))  # of Nerva's tables: 3072-1024-512-10


class Transformer(nn.Module):
    """A small causal language model."""

    vocabulary: int = 128
    width: int = 256
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits `[batch, time, vocabulary]`."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + self.param("place", nn.initializers.normal(0.02), (1, tokens.shape[1], self.width))
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class LSTM(nn.Module):
    """A language model of one recurrent layer."""

    vocabulary: int = 128
    width: int = 256

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits `[batch, time, vocabulary]`."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(self.vocabulary)(x)


class CNN(nn.Module):
    """Three convolutions and a linear layer.

    Attributes:
      channels: Of the first.
      norm: Whether there is batch norm after each convolution; with the statistics of the batch at hand, always.
    """

    channels: int
    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for factor in (1, 2, 4):
            x = nn.Conv(factor * self.channels, (3, 3))(x)
            if self.norm:
                scale = self.param(f"scale{factor}", nn.initializers.ones, x.shape[-1:])
                shift = self.param(f"shift{factor}", nn.initializers.zeros, x.shape[-1:])
                x = jax.nn.standardize(x, axis=(0, 1, 2), epsilon=1e-5) * scale + shift
            x = nn.relu(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network and a batch.

    Attributes:
      name: For the tables.
      module: The network.
      x: Input.
      y: Labels.
      rows_per_group: Rows that share a choice.
      mlp: `(width, depth, batch)` where PyTorch has it, too.
    """

    name: str
    module: nn.Module
    x: jax.Array
    y: jax.Array
    rows_per_group: int
    mlp: tuple[int, int, int] | None = None


def settings() -> list[Setting]:
    """Return all networks that are measured."""
    keys = jax.random.split(jax.random.key(0), 4)
    out = []
    for width, depth, batch in ((2048, 3, 1024), (2048, 5, 1024), (500, 3, 128), (500, 5, 128)):
        x, y = jax.random.normal(keys[0], (batch, 784)), jax.random.randint(keys[1], (batch,), 0, 10)
        name = f"MLP 784-({width} x {depth - 1})-10, batch {batch}"
        out.append(Setting(name, MLP(width, depth), x, y, 128, (width, depth, batch)))
    tokens = jax.random.randint(keys[2], (16, 65), 0, 128)
    out.append(Setting("transformer 2 x 256, 16 x 64 tokens", Transformer(), tokens[:, :-1], tokens[:, 1:], 64))
    tokens = jax.random.randint(keys[3], (64, 33), 0, 128)
    out.append(Setting("LSTM 256, 64 x 32 tokens", LSTM(), tokens[:, :-1], tokens[:, 1:], 64))
    return out


def small() -> Setting:
    """Return a network of minute size, to see that a measurement runs."""
    return Setting("small MLP", MLP(64, 3), jnp.ones((8, 784)), jnp.zeros(8, jnp.int32), 4, (64, 3, 8))


def large_transformer() -> Setting:
    """Return a transformer of 4 layers, 512 wide, on 16 sequences of 256 tokens."""
    tokens = jax.random.randint(jax.random.key(5), (16, 257), 0, 256)
    module = Transformer(vocabulary=256, width=512, layers=4, heads=8)
    return Setting("transformer 4 x 512, 16 x 256 tokens", module, tokens[:, :-1], tokens[:, 1:], 128)


def problem(
    setting: Setting,
    sparsifier: msbp.Sparsifier | Mapping[str, msbp.Sparsifier] | None,
    backend: str | None = None,
) -> tuple[Callable[..., Any], Any, Any]:
    """Return (gradients, params, memory) of a network; without a sparsifier, gradients are those of plain JAX.

    `gradients(params, memory, x, y) -> (loss, grads, memory)`.
    """
    variables = setting.module.init(jax.random.key(1), setting.x)
    params = variables["params"]
    if sparsifier is None:

        def plain(params: Any, memory: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
            loss, grads = jax.value_and_grad(lambda p: loss_of(setting.module.apply({"params": p}, x), y))(params)
            return loss, grads, memory

        return plain, params, {}
    model = msbp.sparse_vjp(setting.module, sparsifier, backend=backend)
    gradients = msbp.value_and_grad(lambda p, m, x, y: loss_of(model.apply({"params": p}, x, memory=m), y))
    return gradients, params, model.init_memory({"params": params}, setting.x)


def density_of(memory: Any) -> jax.Array:
    """Return the running mean of the share of the rows that is kept where the gradient enters; 1 if none is sampled."""
    state = memory.get("@outputs")
    return state.density if isinstance(state, msbp.SampledRowsState) else jnp.ones((), jnp.float32)


def loss_of(logits: Any, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def step_of(tx: optax.GradientTransformation, gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Return a whole training step over (params, memory, optimizer state)."""

    def step(state: tuple[Any, Any, Any], x: jax.Array, y: jax.Array) -> tuple[tuple[Any, Any, Any], jax.Array]:
        params, memory, opt_state = state
        loss, grads, memory = gradients(params, memory, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), memory, opt_state), loss

    return step
