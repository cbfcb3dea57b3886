"""A plan: another sparsifier for each layer, by patterns over site names, of which the first match wins.

A site is named by the path of its parameter, as in `params`. A pattern that matches nothing raises, and the report says
of everything that stays dense why it does.

    python examples/plan.py
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import msbp_jax as msbp


class Transformer(nn.Module):
    """One block: attention and a wide feed-forward layer, on sequences of features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[batch, time, 1]`."""
        x = nn.Dense(64, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(256, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(1, name="head")(x)


PLAN = {
    "head/*": msbp.dense(),  # the output layer as it is
    "attention/*": msbp.top_k(density=0.25, rows_per_group=8),  # stateless, mild
    "up/kernel": msbp.memorized(msbp.top_k(density=0.05, rows_per_group=8), decay=0.8),  # wide: sparse, with memory
    # nothing matches "embed" and "down": they stay dense, and the report says so
}


def main(steps: int = 200) -> list[float]:
    """Train on a toy regression, print the report, and return the losses."""
    x = jax.random.normal(jax.random.key(0), (16, 12, 8))
    target = jnp.cumsum(x[..., :1], axis=1)
    model = msbp.sparse_vjp(Transformer(), PLAN)
    variables = model.init(jax.random.key(1), x)
    print(model.report(variables, x))

    def loss_fn(params, memory, x):  # noqa: ANN001, ANN202
        return jnp.mean((model.apply({"params": params}, x, memory=memory) - target) ** 2)

    state = msbp.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adam(3e-3), memory=model.init_memory(variables, x)
    )
    step = msbp.train_step(loss_fn)
    losses = []
    for _ in range(steps):
        state, loss = step(state, x)
        losses.append(float(loss))
    diagnosis = jax.jit(msbp.diagnose(loss_fn))(state.params, state.memory, x)
    for name, site in diagnosis.sites.items():
        print(f"{name:24s} cosine to the true gradient {site.cosine:.2f}, density {site.density:.3f}")
    print(f"whole step {diagnosis.cosine:.2f}; loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
