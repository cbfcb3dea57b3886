"""An Equinox model: its arrays are the parameters, the rest of it is static.

The vmap over examples is inside what is wrapped, so that all examples of a batch are rows of one matrix.

    python examples/equinox_mlp.py
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import msbp_jax as msbp


def main(steps: int = 300) -> list[float]:
    """Train on a toy regression and return the losses."""
    model_key, data_key = jax.random.split(jax.random.key(0))
    mlp = eqx.nn.MLP(in_size=8, out_size=1, width_size=256, depth=2, activation=jnp.tanh, key=model_key)
    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    x = jax.random.normal(data_key, (128, 8))
    y = jnp.sin(x.sum(axis=1, keepdims=True))

    def network(params: eqx.nn.MLP, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    f = msbp.sparse_vjp(network, msbp.memorized(msbp.top_k(k=16, rows_per_group=16), decay=0.8))
    memory = f.init_memory(params, x)
    print(f.report(params, x))
    tx = optax.adam(3e-3)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, memory, opt_state):  # noqa: ANN001, ANN202
        loss_fn = lambda params, memory: jnp.mean((f(params, x, memory=memory) - y) ** 2)
        loss, grads, memory = msbp.value_and_grad(loss_fn)(params, memory)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), memory, opt_state, loss

    losses = []
    for _ in range(steps):
        params, memory, opt_state, loss = step(params, memory, opt_state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.1e}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
