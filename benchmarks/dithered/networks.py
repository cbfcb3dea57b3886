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
import optax

from benchmarks.data import cifar, mnist
from benchmarks.data.images import Images
from benchmarks.helpers.networks import CNN, Hidden


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
    return lambda folder: _task(module, mnist.load(folder), optax.sgd(rate, momentum=0.9), epochs)


def _cifar(folder: pathlib.Path | None) -> Task:
    return _task(CNN(32), cifar.centred(folder), optax.adam(1e-3), 3)


def _task(module: nn.Module, images: Images, optimizer: optax.GradientTransformation, epochs: int) -> Task:
    pair = lambda x, y: (jnp.asarray(x), jnp.asarray(y))
    train, test = pair(images.train_x, images.train_y), pair(images.test_x, images.test_y)
    return Task(module, train, test, optimizer, 128, epochs)


TASKS: dict[str, Callable[[pathlib.Path | None], Task]] = {
    "mlp": _on_mnist(Hidden((300, 100)), 0.1, 6),
    "lenet": _on_mnist(LeNet(), 0.02, 2),
    "cifar": _cifar,
}
