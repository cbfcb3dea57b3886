"""What is trained: networks of the sizes that the paper has, on MNIST and CIFAR-10; without a folder, on digits.

| task | network | optimizer |
|---|---|---|
| mlp | LeNet-300-100 on MNIST | SGD 0.1, momentum 0.9, batch 128 |
| lenet | two convolutions of 5 x 5, two linear layers, on MNIST | SGD 0.02, momentum 0.9, batch 128 |
| cifar | three convolutions of 3 x 3 without normalization, a linear layer, on CIFAR-10 | Adam 1e-3, batch 128 |
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data import cifar, mnist


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and its training.

    Attributes:
      module: From images to logits.
      train: Images and labels.
      test: The same.
      optimizer: Its optimizer.
      batch: Examples of a step.
      epochs: How often each is seen.
    """

    module: nn.Module
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    optimizer: optax.GradientTransformation
    batch: int
    epochs: int


class LeNet300(nn.Module):
    """Two hidden layers, 300 and 100 wide."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class LeNet(nn.Module):
    """Convolutions with 20 and 50 channels, a hidden layer of 500."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        side = round(x.shape[-1] ** 0.5)
        x = x.reshape(-1, side, side, 1)
        for channels in (20, 50):
            x = nn.avg_pool(nn.relu(nn.Conv(channels, (5, 5))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Convolutions(nn.Module):
    """Three convolutions and a linear layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for channels in (32, 64, 128):
            x = nn.avg_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def make(name: str, folder: pathlib.Path | None, *, small: bool) -> Task:
    """Return a task.

    Args:
      name: One of `TASKS`.
      folder: Where MNIST and CIFAR-10 lie; None for scikit-learn's digits.
      small: A few steps, to see that it runs.
    """
    task = TASKS[name](folder)
    if not small:
        return task
    cut = lambda part, size: (part[0][:size], part[1][:size])
    return dataclasses.replace(task, train=cut(task.train, 256), test=cut(task.test, 100), batch=64, epochs=2)


def _on_mnist(module: nn.Module, rate: float, epochs: int) -> Callable[[pathlib.Path | None], Task]:
    def task(folder: pathlib.Path | None) -> Task:
        data = mnist.load(folder)
        arrays = _pair(data.train_x, data.train_y), _pair(data.test_x, data.test_y)
        return Task(module, *arrays, optax.sgd(rate, momentum=0.9), 128, epochs)

    return task


def _cifar(folder: pathlib.Path | None) -> Task:
    if folder is None:
        digits = mnist.load(None)
        square = lambda x: x.reshape(-1, 8, 8, 1)
        arrays = _pair(square(digits.train_x), digits.train_y), _pair(square(digits.test_x), digits.test_y)
    else:
        images = cifar.load(folder)
        arrays = _pair(images.train_x - 0.5, images.train_y), _pair(images.test_x - 0.5, images.test_y)
    return Task(Convolutions(), *arrays, optax.adam(1e-3), 128, 3)


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(x), jnp.asarray(y)


TASKS: dict[str, Callable[[pathlib.Path | None], Task]] = {
    "mlp": _on_mnist(LeNet300(), 0.1, 6),
    "lenet": _on_mnist(LeNet(), 0.02, 2),
    "cifar": _cifar,
}
