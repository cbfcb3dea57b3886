"""Write a sparsifier: two pure functions, `init` from a shape and `apply` from a gradient and a state.

This one goes round: step t keeps every `stride`-th feature, starting at t. It is no good alone; with a memory around it
everything is propagated in the end.

    python examples/custom_sparsifier.py
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import msbp_jax as msbp


class RoundRobinState(NamedTuple):
    """Which features are next."""

    step: jax.Array


def round_robin(stride: int) -> msbp.Sparsifier:
    """Keep every `stride`-th feature, starting at the step's number, for the whole batch."""

    def init(aval: jax.ShapeDtypeStruct) -> RoundRobinState:
        del aval  # the state does not depend on the gradient's shape [rows, n]
        return RoundRobinState(jnp.zeros((), jnp.int32))

    def apply(u: jax.Array, state: RoundRobinState) -> tuple[msbp.Columns, RoundRobinState]:
        kept = max(1, u.shape[1] // stride)  # shapes are static: the same number of columns at every step
        index = (state.step + stride * jnp.arange(kept, dtype=jnp.int32)) % u.shape[1]
        return msbp.take_columns(u, index[None], rows_per_group=None), RoundRobinState(state.step + 1)

    return msbp.Sparsifier(init=init, apply=apply, name=f"round_robin({stride})")


def main(steps: int = 300) -> list[float]:
    """Check the sparsifier against the contract, train with it, and return the losses."""
    msbp.testing.check_sparsifier(round_robin(4))
    x = jax.random.normal(jax.random.key(0), (64, 16))
    y = jnp.sin(x.sum(axis=1, keepdims=True))
    params = {
        "in": jax.random.normal(jax.random.key(1), (16, 256)) / 4,
        "out": jax.random.normal(jax.random.key(2), (256, 1)) / 16,
    }
    results = {}
    for name, sparsifier in {
        "round robin": round_robin(16),
        "memorized": msbp.memorized(round_robin(16), decay=0.9),
    }.items():
        f = msbp.sparse_vjp(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], sparsifier)
        tx = optax.sgd(0.05, momentum=0.9)

        def loss_fn(p, memory, f=f):  # noqa: ANN001, ANN202
            return jnp.mean((f(p, x, memory=memory) - y) ** 2)

        def step(carry, _, loss_fn=loss_fn, tx=tx):  # noqa: ANN001, ANN202
            p, memory, opt_state = carry
            loss, grads, memory = msbp.value_and_grad(loss_fn)(p, memory)
            updates, opt_state = tx.update(grads, opt_state, p)
            return (optax.apply_updates(p, updates), memory, opt_state), loss

        _, losses = jax.lax.scan(step, (params, f.init_memory(params, x), tx.init(params)), None, length=steps)
        results[name] = [float(loss) for loss in losses]
        print(f"{name:12s} loss {losses[0]:.3f} -> {losses[-1]:.1e}")
    return results["memorized"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
