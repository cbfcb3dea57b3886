"""Classify images by a convolutional network (NNX): dense, with top-k channels, and with their memory (MSBP).

One choice of channels for the whole batch makes the backward a smaller convolution.

    python examples/cnn_cifar10.py --data FOLDER    # CIFAR-10: cifar10-jpeg.tar.xz, or its train/ and test/ folders
    python examples/cnn_cifar10.py                  # scikit-learn's handwritten digits
"""

import argparse
import itertools
import pathlib
import tarfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

import msbp_jax as msbp

type Images = tuple[np.ndarray, np.ndarray]


def read_jpegs(folder: pathlib.Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (part, class, pixels) for every image of the archive, or of the folders."""
    archive = folder / "cifar10-jpeg.tar.xz"
    if archive.exists():
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield *member.name.split("/")[-3:-1], np.asarray(Image.open(tar.extractfile(member)))
    else:
        for path in sorted(folder.glob("*/*/*.jpg")):
            yield *path.parts[-3:-1], np.asarray(Image.open(path))


def load(folder: pathlib.Path | None) -> tuple[Images, Images]:
    """Return (images, classes) for training and testing; images are `[count, height, width, channels]`."""
    if folder is None:
        digits = load_digits()
        x, y = (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)
        test = np.arange(len(y)) % 5 == 4
        return (x[~test], y[~test]), (x[test], y[test])
    parts: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    for part, label, pixels in read_jpegs(folder):
        parts[part].append((label, pixels))
    classes = sorted({label for label, _ in parts["train"]})
    train, test = (
        (
            np.stack([pixels for _, pixels in parts[part]]).astype(np.float32) / 255 - 0.5,
            np.array([classes.index(label) for label, _ in parts[part]], np.int32),
        )
        for part in ("train", "test")
    )
    return train, test


class CNN(nnx.Module):
    """Three convolutions with batch norm, a mean over positions, ten classes."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        widths = [channels, 64, 128, 128]
        self.convs = nnx.List(
            [nnx.Conv(i, o, (3, 3), strides=2 if i > 1 else 1, rngs=rngs) for i, o in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in widths[1:]])
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean(axis=(1, 2)))


def loss_fn(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    """Update the model, its memory and the optimizer."""
    _, grads = msbp.nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)


@nnx.jit
def predict(model: nnx.Module, x: jax.Array) -> jax.Array:
    """Return the classes of a batch."""
    return model(x).argmax(-1)


def main(data: pathlib.Path | None = None, steps: int = 600, batch: int = 64, seed: int = 0) -> dict[str, float]:
    """Train the three, print the test accuracy of each, and return them."""
    (train_x, train_y), (test_x, test_y) = load(data)
    top_k = msbp.top_k(density=0.5, rows_per_group=None)
    accuracies = {}
    for name, sparsifier in {
        "dense": msbp.dense(),
        "top-k 50 %": top_k,
        "MSBP 50 %": msbp.memorized(top_k, decay=0.2),
    }.items():
        model = msbp.sparse_vjp(CNN(train_x.shape[-1], nnx.Rngs(seed)), sparsifier)
        model.init_memory(jax.ShapeDtypeStruct((batch, *train_x.shape[1:]), jnp.float32))
        optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(2e-3, steps)), wrt=nnx.Param)
        draw = np.random.default_rng(seed)
        for _ in tqdm(range(steps), leave=False, disable=None):
            rows = draw.choice(len(train_y), batch, replace=False)
            train_step(model, optimizer, train_x[rows], train_y[rows])
        model.eval()
        found = [predict(model.module, test_x[i : i + 500]) for i in range(0, len(test_x), 500)]
        accuracies[name] = float((np.concatenate(found) == test_y).mean())
        print(f"{name:10} accuracy {accuracies[name]:.2%}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="folder of CIFAR-10 as JPEG files")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
