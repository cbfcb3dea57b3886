"""Does sampling rows follow dense training, epoch by epoch, and at what speed?

An MLP on MNIST (or the digits) is trained by SGD with momentum, dense and by rows of given relative efficiencies, the
methods in turn, epoch by epoch. For each: loss and accuracy after every epoch, seconds, mean density, and how much of
the bound 1 / (f + (1 - f) density) its speed-up is; f is the share of forward, loss and optimizer in the dense step,
measured in the same run.

python -m studies rows --data FOLDER --epochs 20 --seeds 2
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msbp_jax as msbp
from benchmarks.data import mnist
from benchmarks.helpers import machine
from benchmarks.helpers.networks import MLP, Setting, density_of, loss_of, problem, step_of
from benchmarks.helpers.timing import medians, timed, training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this study can be told."""
    parser.add_argument("--data", type=pathlib.Path, help="folder with MNIST; scikit-learn's digits without it")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--efficiencies", type=float, nargs="*", default=[0.95, 0.9, 1.0])


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train all methods seed by seed; yield the result so far after each."""
    data = mnist.load(args.data)
    arrays = tuple(map(jnp.asarray, data[1:]))
    tx = optax.sgd(args.rate, momentum=0.9)
    module = MLP(args.width, 3)
    methods: dict[str, msbp.Sparsifier | None] = {"dense": None}
    methods |= {f"rows {e:g}": msbp.sample_rows(efficiency=e) for e in args.efficiencies}
    result: dict[str, Any] = {"data": data.name, "machine": machine.describe("not used"), "runs": {}}
    result["setting"] = {key: value for key, value in vars(args).items() if isinstance(value, int | float | list)}
    result["f"] = round(_dense_share(module, tx, arrays, args.batch), 4)
    for seed in range(args.seeds):
        runs = {name: _Run(module, sparsifier, tx, arrays, args.batch, seed) for name, sparsifier in methods.items()}
        for epoch in range(args.epochs):
            for name, one_run in runs.items():
                one_run.epoch()
                last = {key: values[-1] for key, values in one_run.curve.items()}
                print(f"seed {seed}, epoch {epoch + 1}, {name}: {last}", flush=True)
        dense = runs["dense"].curve["seconds"][-1]
        for name, one_run in runs.items():
            density = float(np.mean(one_run.curve["density"]))
            speed_up = dense / one_run.curve["seconds"][-1]
            bound = 1 / (result["f"] + (1 - result["f"]) * density)
            found = {"speed-up": round(speed_up, 3), "mean density": round(density, 3)}
            found["share of bound"] = round(speed_up / bound, 3)
            result["runs"].setdefault(name, []).append({"seed": seed, **found, **one_run.curve})
        yield result


class _Run:
    """One method with one seed."""

    def __init__(
        self, module: MLP, sparsifier: msbp.Sparsifier | None, tx: Any, arrays: Any, batch: int, seed: int
    ) -> None:
        train_x, train_y, test_x, test_y = arrays
        self.steps = len(train_y) // batch
        params = module.init(jax.random.key(seed), train_x[:1])["params"]
        setting = Setting("MLP", module, train_x[:batch], train_y[:batch], 1)
        gradients, _, memory = problem(setting, sparsifier)

        def step(state: Any, rows: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            params, memory, opt_state = state
            loss, grads, memory = gradients(params, memory, train_x[rows], train_y[rows])
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), memory, opt_state), (loss, density_of(memory))

        def epoch(state: Any, key: jax.Array) -> Any:
            order = jax.random.permutation(key, len(train_y))[: self.steps * batch].reshape(self.steps, batch)
            return jax.lax.scan(step, state, order)

        self.state = jax.tree.map(jnp.copy, (params, memory, tx.init(params)))
        self.key = jax.random.fold_in(jax.random.key(1), seed)
        self._epoch = jax.jit(epoch, donate_argnums=0).lower(self.state, self.key).compile()
        self._right = jax.jit(lambda p: (jnp.asarray(module.apply({"params": p}, test_x)).argmax(-1) == test_y).mean())
        self.curve: dict[str, list[float]] = {name: [] for name in ("seconds", "loss", "accuracy", "density")}

    def epoch(self) -> None:
        """Train for an epoch and write down where that leads."""
        done = len(self.curve["loss"])
        begun = time.perf_counter()
        self.state, (loss, density) = jax.block_until_ready(self._epoch(self.state, jax.random.fold_in(self.key, done)))
        passed = time.perf_counter() - begun
        seconds = self.curve["seconds"]
        seconds.append(round((seconds[-1] if seconds else 0.0) + passed, 3))
        self.curve["loss"].append(round(float(loss.mean()), 5))
        self.curve["density"].append(round(float(density.mean()), 4))
        self.curve["accuracy"].append(round(100 * float(self._right(self.state[0])), 3))


def _dense_share(module: MLP, tx: Any, arrays: Any, batch: int) -> float:
    """Return which share of a dense step forward, loss and optimizer are."""
    setting = Setting("MLP", module, arrays[0][:batch], arrays[1][:batch], 1)
    gradients, params, memory = problem(setting, None)
    x, y = setting.x, setting.y
    calls = {
        "forward": timed(jax.jit(lambda p, x, y: loss_of(module.apply({"params": p}, x), y)), params, x, y),
        "gradients": timed(jax.jit(lambda p, x, y: gradients(p, {}, x, y)), params, x, y),
        "step": training(step_of(tx, gradients), (params, memory, tx.init(params)), x, y),
    }
    ms = medians(calls, 15)
    return 1 - (ms["gradients"] - ms["forward"]) / ms["step"]
