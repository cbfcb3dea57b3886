"""Dense training, pruning to 5 % of the weights, and fine-tuning of what is left.

python examples/prune_and_finetune.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import msbp_jax as msbp

DENSITY, BATCH = 0.05, 128


class MLP(nn.Module):
    """Three layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for _ in range(2):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


def train(
    apply: Callable[..., jax.Array], params: Any, x: jax.Array, y: jax.Array, steps: int
) -> tuple[Any, list[float], float]:
    """Train `apply(params, x)` by Adam; return the parameters, the losses, and the seconds of a step."""
    tx = optax.adam(1e-3)
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses, begun = [], 0.0
    for number in range(steps):
        at = (jnp.arange(BATCH) + number * BATCH) % len(x)
        params, opt_state, value = step(params, opt_state, x[at], y[at])
        losses.append(float(value))
        begun = begun or time.perf_counter()  # the first step compiles
    return params, losses, (time.perf_counter() - begun) / max(1, steps - 1)


def main(steps: int = 200) -> list[float]:
    """Train, prune, fine-tune; return the losses of the dense training."""
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    module = MLP()
    accuracy = lambda apply, params: 100 * float((apply(params, x[1500:]).argmax(-1) == y[1500:]).mean())
    told = lambda what, reached, seconds: print(f"{what}: {reached:.1f} %, {1e3 * seconds:.2f} ms a step")

    dense = lambda params, x: module.apply({"params": params}, x)
    params = module.init(jax.random.key(0), x[:1])["params"]
    params, losses, seconds = train(dense, params, x[:1500], y[:1500], steps)
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    told("dense", accuracy(dense, params), seconds)

    variables = msbp.prune({"params": params}, density=DENSITY, include=["Dense_[01]/kernel"])
    model = msbp.sparse_weights(module)
    sparse = lambda params, x: model.apply({"params": params, "sparsity": variables["sparsity"]}, x)
    print(f"pruned: {accuracy(sparse, variables['params']):.1f} %")
    params, _, seconds = train(sparse, variables["params"], x[:1500], y[:1500], steps)
    told("fine-tuned", accuracy(sparse, params), seconds)
    print(model.report({**variables, "params": params}, x[:BATCH]))

    small = msbp.densify({**variables, "params": params})["params"]  # for programs that know nothing of patterns
    print(f"made dense again: {accuracy(dense, small):.1f} %")
    return losses


if __name__ == "__main__":
    main()
