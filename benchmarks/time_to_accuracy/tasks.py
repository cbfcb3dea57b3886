"""What is trained: networks on real data, or on something small without a folder.

| task | network | data | an example is | without a folder |
|---|---|---|---|---|
| mnist | MLP 784-1024-1024-10, SGD with momentum | MNIST | an image | scikit-learn's digits |
| tagger | LSTM, Adam | EWT, universal tags | a sentence | made-up sentences |
| transformer | encoder of two blocks, Adam | EWT, universal tags | a sentence | made-up sentences |
| cnn | three convolutions without normalization, Adam | CIFAR-10 | an image | digits |
| cnn_norm | the same with batch norm | the same | an image | digits |
| language | causal transformer, Adam, a single epoch | characters of Python's library | a window | the same |

In the last one hardly an example is learned before it is gone: what sampling must not make worse.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data import cifar, mnist, tagging, text
from benchmarks.data.images import Images
from benchmarks.helpers.networks import CNN, MLP, Transformer

type Batch = dict[str, jax.Array]

LENGTH = 32  # words of a sentence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A network, its data and its training.

    Attributes:
      name: For files and tables.
      module: Called with `inputs(batch)`.
      train: Arrays by name, examples first.
      test: The same for testing.
      inputs: The module's arguments, of a batch.
      labels: What is to be told, of a batch; 0 is nothing where `masked`.
      masked: Whether labels of 0 are padding.
      optimizer: From a learning rate to an Optax optimizer.
      rates: Learning rates, of which every method takes its best.
      batch: B, examples of a step.
      budgets: Seconds of training.
      columns: Density and rows per group of top-k and MSBP.
      epochs: How often an example may be seen; None for as often as there is time.
      in_loops: Whether steps and batches of tests are taken in loops of XLA's. On a CPU convolutions in one take many
        times as long.
    """

    name: str
    module: nn.Module
    train: Batch
    test: Batch
    inputs: Callable[[Batch], tuple[jax.Array, ...]]
    labels: Callable[[Batch], jax.Array]
    optimizer: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    batch: int
    budgets: tuple[float, ...]
    columns: tuple[float, int | None]
    masked: bool = False
    epochs: int | None = None
    in_loops: bool = True

    @property
    def examples(self) -> int:
        """How many there are for training."""
        return len(next(iter(self.train.values())))

    def loss(self, logits: Any, batch: Batch) -> jax.Array:
        """Return the mean cross-entropy of what is to be told."""
        labels = self.labels(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if not self.masked:
            return losses.mean()
        told = labels > 0
        return (losses * told).sum() / jnp.maximum(told.sum(), 1)

    def right(self, logits: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return how many labels are told right, and of how many."""
        labels = self.labels(batch)
        told = labels > 0 if self.masked else jnp.ones(labels.shape, bool)
        return ((logits.argmax(-1) == labels) & told).sum(), told.sum()


class Tagger(nn.Module):
    """Embeddings of words and suffixes, an LSTM, a tag for each word."""

    vocabulary: int
    tags: int
    width: int

    @nn.compact
    def __call__(self, words: jax.Array, suffixes: jax.Array) -> jax.Array:
        """Return logits `[batch, time, tags]`."""
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(words) + embed(suffixes)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(self.tags)(x)


class Encoder(nn.Module):
    """A small transformer that sees a whole sentence."""

    vocabulary: int
    tags: int
    width: int
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, words: jax.Array, suffixes: jax.Array) -> jax.Array:
        """Return logits `[batch, time, tags]`."""
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(words) + embed(suffixes)
        x = x + self.param("place", nn.initializers.normal(0.02), (1, words.shape[1], self.width))
        there = nn.make_attention_mask(words > 0, words > 0)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=there)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.tags)(nn.LayerNorm()(x))


def make(name: str, folder: pathlib.Path | None, *, small: bool = False) -> Task:
    """Return a task.

    Args:
      name: One of `TASKS`.
      folder: Where real data lies; None for something small.
      small: Minute sizes and budgets, to see that it runs.
    """
    task = TASKS[name](folder, small)
    return dataclasses.replace(task, batch=32, budgets=(0.2, 0.4, 0.6), rates=task.rates[:2]) if small else task


def _mnist(folder: pathlib.Path | None, small: bool) -> Task:
    images = mnist.load(folder)
    return Task(
        name="mnist",
        module=MLP(64 if small else 1024, 3),
        **_images(images),
        optimizer=_momentum,
        rates=(0.05, 0.1, 0.2, 0.4, 0.8),
        batch=1024,
        budgets=(5, 10, 20),
        columns=(0.1, 32),
    )


def _momentum(learning_rate: Any) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


def _cnn(folder: pathlib.Path | None, small: bool) -> Task:
    images = cifar.centred(folder)
    # Half of the test set, as a look takes as long as steps; drawn, since it lies class by class.
    some = np.random.default_rng(0).permutation(len(images.test_y))[:5000]
    images = images._replace(test_x=images.test_x[some], test_y=images.test_y[some])
    return Task(
        name="cnn",
        module=CNN(16 if small else 32),
        **_images(images),
        optimizer=optax.adam,
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
        batch=256,
        budgets=(10, 20, 40),
        columns=(0.5, None),
        in_loops=False,
    )


def _cnn_norm(folder: pathlib.Path | None, small: bool) -> Task:
    return dataclasses.replace(_cnn(folder, small), name="cnn_norm", module=CNN(16 if small else 32, norm=True))


def _words(folder: pathlib.Path | None) -> tuple[dict[str, Any], tagging.Tagging]:
    # As taggers do, words seen but once are not known; with all of them the optimizer of the table is most of a step.
    data = tagging.load(folder, 12 if folder is None else LENGTH, at_least=2)
    found = {
        "train": {name: jnp.asarray(array) for name, array in data.train.items()},
        "test": {name: jnp.asarray(array) for name, array in data.test.items()},
        "inputs": lambda batch: (batch["words"], batch["suffixes"]),
        "labels": lambda batch: batch["tags"],
        "masked": True,
        "optimizer": optax.adam,
    }
    return found, data


def _tagger(folder: pathlib.Path | None, small: bool) -> Task:
    arrays, data = _words(folder)
    module = Tagger(data.vocabulary, data.tags, 64 if small else 256)
    return Task(
        name="tagger",
        module=module,
        **arrays,
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
        batch=64,
        budgets=(5, 10, 20),
        columns=(0.1, 32),
    )


def _transformer(folder: pathlib.Path | None, small: bool) -> Task:
    arrays, data = _words(folder)
    module = Encoder(data.vocabulary, data.tags, *((64, 1) if small else (128,)))
    return Task(
        name="transformer", module=module, **arrays, rates=(5e-4, 1e-3, 2e-3, 4e-3), batch=64, budgets=(5, 10, 20),
        columns=(0.25, 32),
    )  # fmt: skip


def _language(folder: pathlib.Path | None, small: bool) -> Task:
    del folder
    length, numbers = 64, text.load()
    cut = len(numbers) * 9 // 10
    windows = lambda part: {"characters": jnp.asarray(part[: len(part) // (length + 1) * (length + 1)]
                                                      .reshape(-1, length + 1))}  # fmt: skip
    train, test = windows(numbers[:cut]), windows(numbers[cut:])
    if small:
        train, test = ({"characters": part["characters"][:256]} for part in (train, test))
    return Task(
        name="language",
        module=Transformer(int(numbers.max()) + 1, *((64, 1) if small else (128,))),
        train=train,
        test={"characters": test["characters"][:1000]},
        inputs=lambda batch: (batch["characters"][:, :-1],),
        labels=lambda batch: batch["characters"][:, 1:],
        optimizer=optax.adam,
        rates=(1e-3, 2e-3, 4e-3),
        batch=32,
        budgets=(5, 10, 20),
        columns=(0.25, 32),
        epochs=1,
    )


def _images(images: Images) -> dict[str, Any]:
    return {
        "train": {"x": jnp.asarray(images.train_x), "y": jnp.asarray(images.train_y)},
        "test": {"x": jnp.asarray(images.test_x), "y": jnp.asarray(images.test_y)},
        "inputs": lambda batch: (batch["x"],),
        "labels": lambda batch: batch["y"],
    }


TASKS = {
    "mnist": _mnist,
    "tagger": _tagger,
    "transformer": _transformer,
    "cnn": _cnn,
    "cnn_norm": _cnn_norm,
    "language": _language,
}
