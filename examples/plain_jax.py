"""Without Flax: any function `f(params, *args)`, here a stack of layers under `lax.scan`.

The stacked weight is one parameter and one site; its memory is stacked like it, one for each layer.

    python examples/plain_jax.py
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from jax import lax

import msbp_jax as msbp

WIDTH, LAYERS = 256, 4


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return `[batch, 1]`: a projection, a scan over residual layers, a readout."""

    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ w), None

    h, _ = lax.scan(layer, x @ params["project"], params["layers"])
    return h @ params["read"]


def main(steps: int = 300) -> list[float]:
    """Train on a toy regression and return the losses."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "project": jax.random.normal(keys[0], (8, WIDTH)) / 8**0.5,
        "layers": jax.random.normal(keys[1], (LAYERS, WIDTH, WIDTH)) / (2 * WIDTH**0.5),
        "read": jax.random.normal(keys[2], (WIDTH, 1)) / WIDTH**0.5,
    }
    x = jax.random.normal(keys[3], (128, 8))
    y = jnp.sin(x.sum(axis=1, keepdims=True))

    f = msbp.sparse_vjp(network, msbp.memorized(msbp.top_k(k=16, rows_per_group=16), decay=0.8))
    memory = f.init_memory(params, x)
    print(f.report(params, x))
    print("memory:", jax.tree.map(jnp.shape, memory))
    tx = optax.adam(1e-3)

    def loss_fn(params, memory, x, y):  # noqa: ANN001, ANN202
        return jnp.mean((f(params, x, memory=memory) - y) ** 2)

    def step(carry, _):  # noqa: ANN001, ANN202
        params, memory, opt_state = carry
        loss, grads, memory = msbp.value_and_grad(loss_fn)(params, memory, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), memory, opt_state), loss

    # The whole training under one scan: the memory is carried like the optimizer's state.
    train = jax.jit(lambda carry: lax.scan(step, carry, None, length=steps))
    _, losses = train((params, memory, tx.init(params)))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.1e}")
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
