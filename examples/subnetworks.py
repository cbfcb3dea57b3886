"""Training by fewer and fewer of the units, down to a fifth; the best draw is taken out and fine-tuned.

python examples/subnetworks.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import msbp_jax as msbp

BUDGET, BATCH = 0.2, 128
WIDTHS = {"first": 512, "second": 512}


class MLP(nn.Module):
    """Two hidden layers, each of a width of its own."""

    widths: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for name in WIDTHS:
            x = nn.relu(nn.Dense(self.widths[name])(x))
        return nn.Dense(10)(x)


def loss_fn(model: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the loss of a module, or of a `msbp.Narrow` one with narrow parameters."""
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def main(steps: int = 300) -> list[float]:
    """Train, take out, fine-tune; return the losses of the small networks that were trained."""
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    batch = lambda number: (jnp.arange(BATCH) + number * BATCH) % len(x)
    variables = MLP(WIDTHS).init(jax.random.key(0), x[:1])
    units = msbp.find_units(MLP, variables, x[:1], widths=WIDTHS)
    print(units)
    shrinking = optax.linear_schedule(0.6, BUDGET, steps // 2)
    sub, tx = msbp.subnetwork(MLP, units=units, budget=shrinking), optax.adam(1e-2)
    params, structure = variables["params"], sub.init(variables, x[:1])
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, structure: Any, sample: Any, x: jax.Array, y: jax.Array) -> Any:
        run = sub.value_and_grad(loss_fn, kept_only=True)
        loss, grads, of_structure = run(params, structure, sample, x, y)
        params, opt_state = sub.update_kept(tx, grads, opt_state, params, sample.first)
        return params, opt_state, sub.update(of_structure, structure), loss

    losses: list[float] = []
    sample = None
    for number in range(steps):
        sample, at = sub.sample(structure, jax.random.key(number), sample), batch(number)
        params, opt_state, structure, loss = step(params, opt_state, structure, sample, x[at], y[at])
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, by networks of a fifth of the units")

    best = sub.best(structure, params, jax.random.key(steps), loss_fn, x, y)
    module, small = sub.extract(params, best)
    tx = optax.adam(1e-3)
    opt_state = tx.init(small)
    value_and_grad = jax.jit(jax.value_and_grad(lambda small, x, y: loss_fn(module, small, x, y)))
    for number in range(steps // 4):
        value, grads = value_and_grad(small, x[batch(number)], y[batch(number)])
        updates, opt_state = tx.update(grads, opt_state, small)
        small = optax.apply_updates(small, updates)
    right = (jnp.asarray(module.apply({"params": small}, x)).argmax(-1) == y).mean()
    print(f"{module.widths}: loss {float(value):.3f} after fine-tuning, {100 * float(right):.1f} % of the digits right")
    return losses


if __name__ == "__main__":
    main()
