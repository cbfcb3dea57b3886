"""A transformer that predicts characters, in bfloat16 with AdamW; 12 layers, 1,024 wide, or smaller."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.data import text


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a model and of its training."""

    layers: int = 12
    width: int = 1024
    heads: int = 16
    length: int = 1024
    batch: int = 16
    steps: int = 300


class Block(nn.Module):
    """Causal attention and an MLP in bfloat16, with residuals; shaped to be scanned over."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Return `[batch, time, width]` and nothing."""
        size, half = self.size, jnp.bfloat16
        h = nn.Dense(3 * size.width, dtype=half, name="qkv")(nn.LayerNorm(dtype=half)(x))
        q, k, v = (part.reshape(*part.shape[:2], size.heads, -1) for part in jnp.split(h, 3, axis=-1))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(size.width, dtype=half, name="out")(y)
        h = nn.gelu(nn.Dense(4 * size.width, dtype=half, name="up")(nn.LayerNorm(dtype=half)(x)))
        return x + nn.Dense(size.width, dtype=half, name="down")(h), None


class LanguageModel(nn.Module):
    """Characters in, logits of the next ones out."""

    vocabulary: int
    size: Size

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Return logits `[batch, time, vocabulary]`, float32."""
        size = self.size
        x = nn.Embed(self.vocabulary, size.width, dtype=jnp.bfloat16)(characters)
        x = x + self.param("place", nn.initializers.normal(0.02), (size.length, size.width)).astype(x.dtype)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=size.layers)
        x, _ = blocks(size, name="blocks")(x, None)
        return nn.Dense(self.vocabulary, name="readout")(nn.LayerNorm()(x.astype(jnp.float32)))


def methods(density: float, length: int) -> dict[str, dict[str, msbp.Sparsifier]]:
    """Return the plan of each method, by name.

    Args:
      density: Share of the features.
      length: Rows of a sequence, of which up to 128 share a choice.
    """
    top_k = msbp.top_k(density=density, rows_per_group=min(length, 128))
    whole = msbp.top_k(density=density, rows_per_group=None)
    in_blocks = {
        "dense": msbp.dense(),
        "top-k": top_k,
        "MSBP": msbp.memorized(top_k, decay=0.8),
        "MSBP, whole batch": msbp.memorized(whole, decay=0.8),
        "rows, 1/4 of the words": msbp.sample_rows(density=1 / 4),
        "dithered, 8 bits": msbp.dithered(4, bits=8),
    }
    half = msbp.sample_rows(density=1 / 2, rows_per_group="example")
    sequences = {"@outputs": half, "*": msbp.skip_zero_rows()}
    return {name: {"blocks/*": each} for name, each in in_blocks.items()} | {"half of the sequences": sequences}


class Trainer:
    """A model, its compiled step and its state."""

    def __init__(self, plan: dict[str, msbp.Sparsifier], numbers: np.ndarray, size: Size) -> None:
        self.batches = text.windows(numbers[: len(numbers) * 9 // 10], size.batch, size.length, 0)
        x, _ = next(self.batches)
        module = LanguageModel(int(numbers.max()) + 1, size)
        self.model = msbp.sparse_vjp(module, plan)
        variables = self.model.init(jax.random.key(0), x)
        self.report = self.model.report(variables, x)
        rate = optax.warmup_cosine_decay_schedule(0, 6e-4, max(1, size.steps // 10), max(2, size.steps))
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))

        def loss(params: Any, memory: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits = self.model.apply({"params": params}, x, memory=memory)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        self.state = msbp.TrainState.create(
            apply_fn=self.model.apply,
            params=variables["params"],
            tx=tx,
            memory=self.model.init_memory(variables, x),
        )
        self._step = msbp.train_step(loss)

    def step(self) -> jax.Array:
        """Take one step and return its loss."""
        self.state, loss = self._step(self.state, *next(self.batches))
        return loss

    def accuracy(self, numbers: np.ndarray, size: Size) -> float:
        """Return how often the next character of held-out text is predicted, in percent."""
        predict = jax.jit(lambda params, x: self.model.apply({"params": params}, x).argmax(-1))
        held_out = text.windows(numbers[len(numbers) * 9 // 10 :], size.batch, size.length, 1)
        right = []
        for _ in range(8):
            x, y = next(held_out)
            right.append(float((np.asarray(predict(self.state.params, x)) == y).mean()))
        return 100 * float(np.mean(right))
