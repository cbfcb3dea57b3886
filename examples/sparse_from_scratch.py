"""Train a sparse network from scratch: a pattern that stays, SET, RigL and gradual pruning, beside a dense one.

python examples/sparse_from_scratch.py --data FOLDER    # MNIST: its four IDX files, gzipped
python examples/sparse_from_scratch.py                  # scikit-learn's handwritten digits
"""

from __future__ import annotations

import argparse
import gzip
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import msbp_jax as msbp

type Images = tuple[np.ndarray, np.ndarray]


class MLP(nn.Module):
    """Three layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def load(folder: pathlib.Path | None) -> tuple[Images, Images]:
    """Return images `[n, pixels]` and classes, to train with and to test with."""
    if folder is None:
        digits = load_digits()
        x, y = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
        return (x[:1400], y[:1400]), (x[1400:], y[1400:])
    raw = lambda name: gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
    pixels = lambda part: np.frombuffer(raw(f"{part}-images-idx3"), np.uint8, offset=16).reshape(-1, 784)
    x = {part: pixels(part).astype(np.float32) / 255 for part in ("train", "t10k")}
    y = {part: np.frombuffer(raw(f"{part}-labels-idx1"), np.uint8, offset=8).astype(np.int32) for part in x}
    return (x["train"], y["train"]), (x["t10k"], y["t10k"])


def train(
    module: nn.Module, variables: Any, schedule: msbp.SparsitySchedule, state: Any, data: Images, steps: int, batch: int
) -> tuple[Any, float]:
    """Train by Adam and a schedule; return the variables and the seconds it took, compiling included."""
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    opt_state, model = tx.init(variables["params"]), msbp.sparse_weights(module)

    @jax.jit
    def step(variables: Any, opt_state: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        loss = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        apply = model.apply if "sparsity" in variables else module.apply  # dense before the first pruning
        grads = jax.grad(lambda params: loss(apply({**variables, "params": params}, x)))(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        variables = {**variables, "params": optax.apply_updates(variables["params"], updates)}
        if schedule.changes_shapes:
            return variables, opt_state, state
        # RigL asks for the gradient of the dense weights now and then: of the plain module, on this batch.
        dense_grad_fn = jax.grad(lambda dense: loss(module.apply({"params": dense}, x)))
        return schedule.update(tx, variables, opt_state, state, dense_grad_fn)

    draw, begun = np.random.default_rng(0), time.perf_counter()
    for _ in range(steps):
        rows = draw.choice(len(data[1]), batch, replace=False)
        if not schedule.changes_shapes:
            variables, opt_state, state = step(variables, opt_state, state, data[0][rows], data[1][rows])
        else:
            variables, opt_state, _ = step(variables, opt_state, None, data[0][rows], data[1][rows])
            variables, opt_state, state = schedule.update(tx, variables, opt_state, state)
    return jax.block_until_ready(variables), time.perf_counter() - begun


def main(
    data: pathlib.Path | None = None, steps: int = 2000, density: float = 0.05, width: int = 256, batch: int = 128
) -> dict[str, float]:
    """Train all of them, print a table, and return the test accuracies."""
    training, (test_x, test_y) = load(data)
    module = MLP(width)
    dense = module.init(jax.random.key(0), training[0][:1])
    # At random, and more of small layers: nothing is known of the weights yet. A feature has fewer inputs than a dense
    # one: larger weights leave its variance as it was.
    sparse = msbp.prune(dense, density=density, method="random", scope="erdos_renyi", key=jax.random.key(1))
    for layer, patterns in sparse["sparsity"].items():
        sparse["params"][layer]["kernel"] /= patterns["kernel"].density ** 0.5
    tenth, every = max(1, steps // 10), max(1, steps // 20)
    schedules = {
        "dense": msbp.gradual_pruning(density, begin=steps + 1, end=steps + 1, every=1),  # after the end
        "static": msbp.static_sparsity(),
        "SET": msbp.sparse_evolution(every=every, until=max(every + 1, 3 * steps // 4)),
        "RigL": msbp.rigl(every=every, until=max(every + 1, 3 * steps // 4)),
        # SparseProp's stages: a tenth dense, 5 % pruned, then more and more until four fifths.
        "gradual": msbp.gradual_pruning(
            density, begin=tenth, end=max(tenth, 8 * steps // 10), every=tenth, initial_density=0.95
        ),
    }
    accuracies = {}
    for name, schedule in schedules.items():
        variables = dense if schedule.changes_shapes else sparse
        state = schedule.init(variables, jax.random.key(2) if name == "SET" else None)
        variables, seconds = train(module, variables, schedule, state, training, steps, batch)
        entries = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        logits = module.apply(msbp.densify(variables), jnp.asarray(test_x))
        accuracies[name] = float((logits.argmax(-1) == test_y).mean())
        print(f"{name:8} {entries:8,} parameters   accuracy {accuracies[name]:.2%}   {seconds:5.1f} s")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="folder of MNIST's four IDX files, gzipped")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--width", type=int, default=256)
    main(**vars(parser.parse_args()))
