"""The transformer of the accelerator benchmark: 12 layers, 1,024 wide, 1,024 characters, bfloat16, AdamW."""

from __future__ import annotations

import dataclasses
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a model and of its training."""

    layers: int = 12
    width: int = 1024
    heads: int = 16
    length: int = 1024
    batch: int = 16
    steps: int = 1000


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


def text() -> np.ndarray:
    """Return two million characters of Python's standard library, as numbers."""
    sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = "\n".join(source.read_text(errors="ignore") for source in sources)[:2_000_000]
    characters = {character: i for i, character in enumerate(sorted(set(found)))}
    return np.array([characters[character] for character in found], np.int32)


def windows(numbers: np.ndarray, size: Size, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of windows and, for each character, the one behind it."""
    draw = np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(numbers) - size.length - 1, size.batch)
        found = numbers[starts[:, None] + np.arange(size.length + 1)]
        yield found[:, :-1], found[:, 1:]


class Trainer:
    """A model, its compiled step and its state."""

    def __init__(self, sparsifier: msbp.Sparsifier, numbers: np.ndarray, size: Size) -> None:
        self.batches = windows(numbers[: len(numbers) * 9 // 10], size, 0)
        x, _ = next(self.batches)
        module = LanguageModel(int(numbers.max()) + 1, size)
        self.model = msbp.sparse_vjp(module, {"blocks/*": sparsifier})
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
        held_out, right = windows(numbers[len(numbers) * 9 // 10 :], size, 1), []
        for _ in range(8):
            x, y = next(held_out)
            right.append(float((np.asarray(predict(self.state.params, x)) == y).mean()))
        return 100 * float(np.mean(right))
