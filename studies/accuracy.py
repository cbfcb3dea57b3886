"""Accuracy on MNIST of dense, plain top-k and memorized top-k: 784-500-500-10, the setting of the papers.

A method's epochs run under scan, and `--at-once` seeds are trained together under vmap: one on a CPU, where it is
fastest, all of them on a GPU. On one CPU core the whole table takes about an hour.

python -m studies accuracy --data FOLDER --out benchmarks/results/accuracy.json
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.data import mnist
from benchmarks.data.images import Images


class MLP(nn.Module):
    """Two hidden layers with dropout, as in meProp's MNIST script."""

    width: int = 500
    rate: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits `[batch, 10]`."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
            x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(10)(x)


def methods(k: int, decay: float) -> dict[str, msbp.Sparsifier]:
    """Return every method of the table, by name."""
    table = {"dense": msbp.dense()}
    for name, group in (("r=1", 1), ("r=10", 10), ("whole batch", None)):
        plain = msbp.top_k(k=k, rows_per_group=group)
        table[f"top-k, {name}"] = plain
        table[f"MSBP, {name}"] = msbp.memorized(plain, decay=decay)
    return table


def train(
    data: Images, sparsifier: msbp.Sparsifier, seeds: int, at_once: int, epochs: int, batch: int, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return test accuracy in percent, `[epochs, seeds]`, and mean training loss, of the same shape."""
    model = msbp.sparse_vjp(MLP(rate=rate), sparsifier)
    tx = optax.adam(1e-3)
    train_x, train_y, test_x, test_y = (jnp.asarray(a) for a in data[1:])
    steps = len(train_x) // batch

    def loss_fn(params: Any, memory: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, x, train=True, rngs={"dropout": key}, memory=memory)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def start(key: jax.Array) -> tuple[Any, Any, Any, jax.Array]:
        key, init_key = jax.random.split(key)
        variables = model.init(init_key, train_x[:batch])
        memory = model.init_memory(variables, train_x[:batch])
        return variables["params"], memory, tx.init(variables["params"]), key

    def epoch(carry: tuple[Any, Any, Any, jax.Array]) -> tuple[tuple[Any, Any, Any, jax.Array], jax.Array, jax.Array]:
        params, memory, opt_state, key = carry
        key, order_key, dropout_key = jax.random.split(key, 3)
        order = jax.random.permutation(order_key, len(train_x))[: steps * batch].reshape(steps, batch)

        def step(
            carry: tuple[Any, Any, Any], inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[Any, Any, Any], jax.Array]:
            params, memory, opt_state = carry
            rows, key = inputs
            loss, grads, memory = msbp.value_and_grad(loss_fn)(params, memory, train_x[rows], train_y[rows], key)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), memory, opt_state), loss

        keys = jax.random.split(dropout_key, steps)
        (params, memory, opt_state), losses = jax.lax.scan(step, (params, memory, opt_state), (order, keys))
        right = model.apply({"params": params}, test_x).argmax(-1) == test_y
        return (params, memory, opt_state, key), 100 * right.mean(), losses.mean()

    starts = jax.jit(jax.vmap(start))
    run_epoch = jax.jit(jax.vmap(epoch), donate_argnums=0)
    curves = []
    for first in range(0, seeds, at_once):
        carry = starts(jax.vmap(jax.random.key)(jnp.arange(first, min(first + at_once, seeds))))
        curve = []
        for _ in range(epochs):
            carry, accuracy, loss = run_epoch(carry)
            curve.append((np.asarray(accuracy), np.asarray(loss)))
        curves.append(tuple(np.stack(part) for part in zip(*curve, strict=True)))
    accuracies, losses = (np.concatenate(part, axis=1) for part in zip(*curves, strict=True))
    return accuracies, losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this study can be told."""
    parser.add_argument("--data", type=pathlib.Path, help="folder with MNIST; scikit-learn's digits without it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=1, help="seeds trained together")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--decay", type=float, default=0.8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--only", nargs="*", help="names of methods; all of them by default")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train every method; yield the table so far after each."""
    data = mnist.load(args.data)
    named = ("seeds", "at_once", "epochs", "batch", "k", "decay", "dropout")
    result: dict[str, Any] = {
        "data": data.name,
        "setting": {name: getattr(args, name) for name in named},
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
        "methods": {},
    }
    for name, sparsifier in methods(args.k, args.decay).items():
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        accuracy, loss = train(data, sparsifier, args.seeds, args.at_once, args.epochs, args.batch, args.dropout)
        last = accuracy[-1]
        spread = last.std(ddof=1) if args.seeds > 1 else 0.0
        print(f"{name:20s} {last.mean():.2f} +- {spread:.2f}  {np.round(last, 2)}", flush=True)
        result["methods"][name] = {
            "test_accuracy": np.round(accuracy, 3).tolist(),
            "train_loss": np.round(loss, 5).tolist(),
            "seconds": round(time.perf_counter() - start, 1),
        }
        yield result
