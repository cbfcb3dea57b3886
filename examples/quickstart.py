"""Train a Flax model with memorized sparse backpropagation: three changed lines, marked (1) to (3).

python examples/quickstart.py
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import msbp_jax as msbp


class MLP(nn.Module):
    """Two wide layers and ten classes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        x = nn.relu(nn.Dense(512)(x))
        x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


def main(steps: int = 400, batch: int = 128) -> list[float]:
    """Train, print the test accuracy, and return the losses."""
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)
    train_x, train_y, test_x, test_y = x[:1437], y[:1437], x[1437:], y[1437:]

    sparsifier = msbp.memorized(msbp.top_k(density=0.04, rows_per_group=16), decay=0.8)
    model = msbp.sparse_vjp(MLP(), sparsifier)  # (1) was: model = MLP()
    variables = model.init(jax.random.key(0), train_x[:1])
    params = variables["params"]
    memory = model.init_memory(variables, train_x[:batch])  # (2) new
    print(model.report(variables, train_x[:batch]))

    tx = optax.adam(1e-3)
    opt_state = tx.init(params)

    def loss_fn(params, memory, x, y):  # noqa: ANN001, ANN202
        logits = model.apply({"params": params}, x, memory=memory)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def train_step(params, memory, opt_state, x, y):  # noqa: ANN001, ANN202
        loss, grads, memory = msbp.value_and_grad(loss_fn)(params, memory, x, y)  # (3) was: jax.value_and_grad
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), memory, opt_state, loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        rows = jax.random.choice(key, len(train_y), (batch,), replace=False)
        params, memory, opt_state, loss = train_step(params, memory, opt_state, train_x[rows], train_y[rows])
        losses.append(float(loss))
    accuracy = (model.apply({"params": params}, test_x).argmax(-1) == test_y).mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, test accuracy {accuracy:.2%}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
