"""What is trained: networks, data and optimizers; on scikit-learn's digits without a folder.

| task | network | optimizer | sparse |
|---|---|---|---|
| mlp | 784-1024-1024-10 on MNIST, batch 128 | SGD 0.1, momentum 0.9, cosine | 10 % of hidden kernels |
| nerva | 3072-1024-512-10 on CIFAR-10, batch 100 | the same | the same |
| cnn | residual blocks of 32, 64, 128 channels, CIFAR-10, batch 128 | the same, and decay 5e-4 | 5 % of each block |
| wide | the same of 64, 128, 256 channels | the same | the same |
| deep | the same of 64, 128, 256, 512 channels | the same | 5 % of all blocks, Erdos-Renyi |

Images of CIFAR-10 are shifted and mirrored, anew in every epoch. The CNN has batch norm; its stem, its projections
(1 x 1) and all last layers are dense.
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

from benchmarks.data import cifar, mnist
from benchmarks.data.images import Images
from benchmarks.helpers.networks import MLP, NERVA, Hidden

HIDDEN = ("Dense_0/kernel", "Dense_1/kernel")


class Residual(nn.Module):
    """A stem, and a block of two convolutions for each number of channels; all but the first block halve the image."""

    channels: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[batch, 10]`."""
        norm = lambda x: nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        conv = lambda size, width, strides, name: nn.Conv(width, (size, size), strides, use_bias=False, name=name)
        x = nn.relu(norm(conv(3, self.channels[0], 2, "stem")(x)))
        for at, width in enumerate(self.channels):
            strides = 1 if at == 0 else 2
            y = nn.relu(norm(conv(3, width, strides, f"block{at}_first")(x)))
            y = norm(conv(3, width, 1, f"block{at}_second")(y))
            if y.shape != x.shape:
                x = norm(conv(1, width, strides, f"project{at}")(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """A network, its data and its training.

    Attributes:
      name: For files and tables.
      module: The plain network.
      images: The data.
      batch: Examples of a step.
      epochs: How often each is seen.
      density: Share of the entries that sparse weights have in the end, of all together.
      include: Which weights are sparse, as for `msbp.prune`.
      input_axes: As for `msbp.prune`.
      scope: As for `msbp.prune`.
      rate: Of learning, at the start.
      decay: Of kernels.
      moved: Whether images are shifted and mirrored.
      convolutions: Whether the network has any.
      every: Steps between changes by SET and RigL.
      stages: Of gradual pruning.
      early_stages: Of gradual pruning that ends early.
    """

    name: str
    module: nn.Module
    images: Images
    batch: int
    epochs: int
    density: float = 0.1
    include: tuple[str, ...] = HIDDEN
    input_axes: Mapping[str, int] | None = None
    scope: str = "erdos_renyi"
    rate: float = 0.1
    decay: float = 0.0
    moved: bool = False
    convolutions: bool = False
    every: int = 100
    stages: int = 8
    early_stages: int = 5

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.images.train_y) // self.batch

    @property
    def pruning(self) -> dict[str, Any]:
        """What `msbp.prune` and `msbp.gradual_pruning` are told: all methods end with as many entries of a layer."""
        return {"include": self.include, "input_axes": self.input_axes, "scope": self.scope}

    def optimizer(self) -> optax.GradientTransformation:
        """Return the optimizer."""
        sgd = optax.sgd(optax.cosine_decay_schedule(self.rate, self.epochs * self.steps), momentum=0.9)
        return optax.chain(optax.add_decayed_weights(self.decay, _kernels), sgd) if self.decay else sgd

    def init(self, seed: int) -> Any:
        """Return dense variables."""
        return self.module.init(jax.random.key(seed), jnp.asarray(self.images.train_x[:2]))

    def epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of an epoch, and the rows of each step."""
        draw = np.random.default_rng((seed, epoch))
        order = draw.permutation(len(self.images.train_y))[: self.steps * self.batch]
        x = cifar.moved(self.images.train_x, draw) if self.moved else self.images.train_x
        return x, order.reshape(self.steps, self.batch)


def loss_fn(model: Any, variables: Mapping[str, Any], x: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Return the loss and the statistics after it, of a plain module or one with sparse weights."""
    stats = [name for name in variables if name not in ("params", "sparsity")]
    logits, changed = model.apply(variables, x, train=True, mutable=stats) if stats else (model.apply(variables, x), {})
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), dict(changed)


def make(name: str, folder: pathlib.Path | None, *, small: bool, epochs: int | None = None) -> Task:
    """Return a task.

    Args:
      name: One of `TASKS`.
      folder: Where MNIST and CIFAR-10 lie; None for digits.
      small: A few steps of a minute network.
      epochs: In place of its own.
    """
    task = TASKS[name](folder)
    if small:
        x, y, test_x, test_y = task.images[1:]
        images = task.images._replace(train_x=x[:256], train_y=y[:256], test_x=test_x[:100], test_y=test_y[:100])
        sizes: dict[str, Any] = {"batch": 64, "epochs": 2, "density": 0.2, "every": 2, "stages": 2, "early_stages": 2}
        task = dataclasses.replace(task, images=images, module=_SMALL[name], **sizes)
    return task if epochs is None else dataclasses.replace(task, epochs=epochs)


def _kernels(params: Any) -> Any:
    # By path: the leaf of a sparse kernel has one axis, as a bias has.
    is_kernel = lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/").endswith("kernel")
    return jax.tree_util.tree_map_with_path(is_kernel, params)


def _mlp(folder: pathlib.Path | None) -> Task:
    return Task(name="mlp", module=MLP(1024, 3), images=mnist.load(folder), batch=128, epochs=10)


def _nerva(folder: pathlib.Path | None) -> Task:
    images = cifar.centred(folder)
    flat = lambda x: x.reshape(len(x), -1)
    images = images._replace(train_x=flat(images.train_x), test_x=flat(images.test_x))
    return Task(name="nerva", module=NERVA, images=images, batch=100, epochs=20, moved=folder is not None)


def _cnn(folder: pathlib.Path | None) -> Task:
    return Task(
        name="cnn",
        module=Residual(),
        images=cifar.centred(folder),
        batch=128,
        epochs=12,
        density=0.05,
        include=("block*/kernel",),
        input_axes={"block*/kernel": 3},
        scope="layer",
        decay=5e-4,
        moved=folder is not None,
        convolutions=True,
    )


def _wide(folder: pathlib.Path | None) -> Task:
    return dataclasses.replace(_cnn(folder), name="wide", module=Residual((64, 128, 256)), epochs=10)


def _deep(folder: pathlib.Path | None) -> Task:
    return dataclasses.replace(_wide(folder), name="deep", module=Residual((64, 128, 256, 512)), scope="erdos_renyi")


TASKS: dict[str, Callable[[pathlib.Path | None], Task]] = {
    "mlp": _mlp,
    "nerva": _nerva,
    "cnn": _cnn,
    "wide": _wide,
    "deep": _deep,
}
_SMALL: dict[str, nn.Module] = {"mlp": MLP(64, 3), "nerva": Hidden((64, 32)), "cnn": Residual((8, 8))}
_SMALL |= {"wide": _SMALL["cnn"], "deep": _SMALL["cnn"]}
