"""What is trained: networks whose widths can be smaller, on real data, or on digits without a folder.

| task | network | optimizer |
|---|---|---|
| mlp | 784-2048-2048-10 on MNIST, batch 1024 | SGD 0.1, momentum 0.9, cosine |
| cnn | three residual stages of 32, 64 and 128 channels, batch norm, on CIFAR-10, batch 128 | the same |
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.data import cifar, mnist
from benchmarks.data.images import Images


class Wide(nn.Module):
    """Two hidden layers of widths of their own."""

    widths: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[batch, 10]`."""
        del train
        for name in ("first", "second"):
            x = nn.relu(nn.Dense(self.widths[name])(x))
        return nn.Dense(10)(x)


class Residual(nn.Module):
    """A stage is a convolution that halves the image, and a residual block with a width of its own inside."""

    widths: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[batch, 10]`."""
        norm = lambda x: nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        for at, strides in enumerate((1, 2, 2)):
            stage, inner = self.widths[f"stage{at}"], self.widths[f"inner{at}"]
            x = nn.relu(norm(nn.Conv(stage, (3, 3), strides, use_bias=False)(x)))
            y = nn.relu(norm(nn.Conv(inner, (3, 3), use_bias=False)(x)))
            x = nn.relu(x + norm(nn.Conv(stage, (3, 3), use_bias=False)(y)))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A network of given widths, its data and its training.

    Attributes:
      name: For files and tables.
      build: From widths to a module.
      widths: In full.
      images: The data.
      batch: Examples of a step.
      epochs: How often each is seen.
    """

    name: str
    build: Callable[[Mapping[str, int]], nn.Module]
    widths: Mapping[str, int]
    images: Images
    batch: int
    epochs: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.images.train_y) // self.batch

    def optimizer(self, epochs: float) -> optax.GradientTransformation:
        """Return the optimizer of the weights for so many epochs."""
        return optax.sgd(optax.cosine_decay_schedule(0.1, max(1, round(epochs * self.steps))), momentum=0.9)

    def init(self, widths: Mapping[str, int], seed: int) -> Any:
        """Return variables."""
        return self.build(widths).init(jax.random.key(seed), jnp.asarray(self.images.train_x[:2]))

    def units(self, variables: Any) -> msbp.Units:
        """Return what is found in the module."""
        x = jnp.asarray(self.images.train_x[:2])
        return msbp.find_units(self.build, variables, x, widths=dict(self.widths))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the rows of each step of an epoch."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.images.train_y))
        return order[: self.steps * self.batch].reshape(self.steps, self.batch)


def loss_fn(model: Any, params: Any, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    """Return the loss and the statistics after it, of a module or a `msbp.Narrow` one."""
    narrow = isinstance(model, msbp.Narrow)
    own = {name: model.narrow(tree) if narrow else tree for name, tree in stats.items()}
    logits, changed = model.apply({"params": params, **own}, x, train=True, mutable=list(stats))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, {name: model.widen(tree, changed[name]) if narrow else changed[name] for name, tree in stats.items()}


def make(name: str, folder: pathlib.Path | None, *, small: bool, epochs: int | None = None) -> Task:
    """Return a task.

    Args:
      name: One of `TASKS`.
      folder: Where MNIST and CIFAR-10 lie; None for digits.
      small: A few steps of minute networks.
      epochs: In place of its own.
    """
    task = TASKS[name](folder)
    if not small:
        return task if epochs is None else dataclasses.replace(task, epochs=epochs)
    x, y, test_x, test_y = task.images[1:]
    images = task.images._replace(train_x=x[:256], train_y=y[:256], test_x=test_x[:100], test_y=test_y[:100])
    widths = dict.fromkeys(task.widths, 64 if name == "mlp" else 32)
    return dataclasses.replace(task, images=images, widths=widths, batch=64, epochs=2)


def _mlp(folder: pathlib.Path | None) -> Task:
    return Task("mlp", Wide, {"first": 2048, "second": 2048}, mnist.load(folder), 1024, 10)


def _cnn(folder: pathlib.Path | None) -> Task:
    widths = {f"{kind}{at}": 32 * 2**at for at in range(3) for kind in ("stage", "inner")}
    return Task("cnn", Residual, widths, cifar.centred(folder), 128, 5)


TASKS: dict[str, Callable[[pathlib.Path | None], Task]] = {"mlp": _mlp, "cnn": _cnn}
