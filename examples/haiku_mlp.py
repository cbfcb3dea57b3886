"""A Haiku-style pair of pure functions: `init` makes the parameters, `apply` is wrapped.

python examples/haiku_mlp.py
"""

import argparse

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import msbp_jax as msbp


def main(steps: int = 300) -> list[float]:
    """Train on a toy regression and return the losses."""
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([256, 256, 1], activation=jnp.tanh)(x)))
    x = jax.random.normal(jax.random.key(1), (128, 8))
    y = jnp.sin(x.sum(axis=1, keepdims=True))
    params = network.init(jax.random.key(0), x)

    apply = msbp.sparse_vjp(network.apply, msbp.memorized(msbp.top_k(k=16, rows_per_group=16), decay=0.8))
    memory = apply.init_memory(params, x)
    print(apply.report(params, x))
    tx = optax.adam(1e-3)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, memory, opt_state):  # noqa: ANN001, ANN202
        loss_fn = lambda params, memory: jnp.mean((apply(params, x, memory=memory) - y) ** 2)
        loss, grads, memory = msbp.value_and_grad(loss_fn)(params, memory)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), memory, opt_state, loss

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
