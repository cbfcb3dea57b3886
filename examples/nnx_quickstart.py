"""Train a Flax NNX model with memorized sparse backpropagation: three changed lines, marked (1) to (3).

python examples/nnx_quickstart.py
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import msbp_jax as msbp


class MLP(nnx.Module):
    """Two wide layers, dropout, ten classes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        self.first = nnx.Linear(64, 512, rngs=rngs)
        self.second = nnx.Linear(512, 512, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        x = nnx.relu(self.first(x))
        return self.head(self.dropout(nnx.relu(self.second(x))))


def main(steps: int = 400, batch: int = 128) -> list[float]:
    """Train, print the test accuracy, and return the losses."""
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)
    train_x, train_y, test_x, test_y = x[:1437], y[:1437], x[1437:], y[1437:]

    sparsifier = msbp.memorized(msbp.top_k(density=0.04, rows_per_group=16), decay=0.8)
    model = msbp.sparse_vjp(MLP(nnx.Rngs(0)), sparsifier)  # (1) was: model = MLP(nnx.Rngs(0))
    model.init_memory(train_x[:batch])  # (2) new: makes the msbp.Memory Variables
    print(model.report(train_x[:batch]))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss_fn(model, x, y):  # noqa: ANN001, ANN202
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def train_step(model, optimizer, x, y):  # noqa: ANN001, ANN202
        loss, grads = msbp.nnx.value_and_grad(loss_fn)(model, x, y)  # (3) was: nnx.value_and_grad
        optimizer.update(model, grads)
        return loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        rows = jax.random.choice(key, len(train_y), (batch,), replace=False)
        losses.append(float(train_step(model, optimizer, train_x[rows], train_y[rows])))
    model.eval()
    accuracy = (model(test_x).argmax(-1) == test_y).mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, test accuracy {accuracy:.2%}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
