"""Train every method: whole epochs under `lax.scan`, same start and same batches for all."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import msbp_jax as msbp
from msbp_jax.demo import timing
from msbp_jax.demo.data import Dataset
from msbp_jax.demo.model import MLP, Gradients, loss_and_gradients
from msbp_jax.demo.settings import OPTIMIZERS, Settings


@dataclasses.dataclass(kw_only=True)
class Result:
    """What one method did.

    Attributes:
      seconds: Training time at the end of each epoch, compilation left out.
      loss: Mean training loss of each epoch.
      accuracy: Test accuracy after each epoch, in [0, 1].
      density: Mean share of the rows that are kept in each epoch; 1 where none are sampled.
      step_ms: Median milliseconds of a training step.
      backward_ms: Median milliseconds of its backward.
      kept: Share of the backward's multiply-adds that is done.
      report: The library's report; None for plain JAX.
    """

    seconds: list[float]
    loss: list[float]
    accuracy: list[float]
    density: list[float]
    step_ms: float = 0.0
    backward_ms: float = 0.0
    kept: float = 1.0
    report: msbp.Report | None = None

    def time_to_loss(self, target: float) -> float | None:
        """Return the seconds after which an epoch's training loss was as low as a target; None for never."""
        return next((s for s, loss in zip(self.seconds, self.loss, strict=True) if loss <= target), None)

    def time_to_accuracy(self, target: float) -> float | None:
        """Return the seconds after which the test accuracy was as high as a target; None for never."""
        return next((s for s, share in zip(self.seconds, self.accuracy, strict=True) if share >= target), None)


def run(settings: Settings, data: Dataset) -> dict[str, Result]:
    """Train all methods and time their steps.

    Args:
      settings: What to train.
      data: What to train on.

    Returns:
      The results by name of the method.
    """
    module = MLP(settings.width, settings.depth)
    init_key, order_key = jax.random.split(jax.random.key(settings.seed))
    sample = jax.ShapeDtypeStruct((settings.batch, data.train_x.shape[1]), jnp.float32)
    params = module.init(init_key, jnp.zeros((1, data.train_x.shape[1])))["params"]
    results, problems = {}, {}
    methods = settings.methods()
    with tqdm(total=len(methods) * settings.epochs, unit="epoch", dynamic_ncols=True, disable=None) as bar:
        for name, sparsifier in methods.items():
            bar.set_description(name)
            gradients, memory, report = loss_and_gradients(module, sparsifier, params, sample)
            tx = OPTIMIZERS[settings.optimizer]()
            state = jax.tree.map(jnp.copy, (params, memory, tx.init(params)))  # each method may donate its own
            results[name], trained = _train(settings, data, module, gradients, tx, state, order_key, bar)
            results[name].report = report
            shares = 1.0 if report is None else 1.0 - report.saved
            results[name].kept = shares * float(np.mean(results[name].density))
            problems[name] = (gradients, tx, *trained)
    steps, backwards = timing.measure(problems, module, data, settings.batch)
    for name, result in results.items():
        result.step_ms, result.backward_ms = steps[name], backwards[name]
    return results


def _train(
    settings: Settings,
    data: Dataset,
    module: MLP,
    gradients: Gradients,
    tx: optax.GradientTransformation,
    state: Any,
    order_key: jax.Array,
    bar: tqdm[Any],
) -> tuple[Result, tuple[Any, Any]]:
    """Return what came of it, and the parameters and memory that did."""
    train_x, train_y, test_x, test_y = (jnp.asarray(part) for part in data[1:])
    steps = len(train_y) // settings.batch

    def step(state: Any, rows: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, memory, opt_state = state
        loss, grads, memory = gradients(params, memory, train_x[rows], train_y[rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), memory, opt_state), (loss, _density(memory))

    def epoch(state: Any, key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        order = jax.random.permutation(key, len(train_y))[: steps * settings.batch]
        state, (losses, densities) = jax.lax.scan(step, state, order.reshape(steps, settings.batch))
        return state, jnp.mean(losses), jnp.mean(densities)

    @jax.jit
    def accuracy(params: Any) -> jax.Array:
        logits: Any = module.apply({"params": params}, test_x)
        return jnp.mean((jnp.argmax(logits, -1) == test_y).astype(jnp.float32))

    keys = jax.random.split(order_key, settings.epochs)
    compiled = jax.jit(epoch, donate_argnums=0).lower(state, keys[0]).compile()
    result, passed = Result(seconds=[], loss=[], accuracy=[], density=[]), 0.0
    for key in keys:
        start = time.perf_counter()
        state, loss, density = compiled(state, key)
        jax.block_until_ready(state)
        passed += time.perf_counter() - start
        result.seconds.append(passed)
        result.loss.append(float(loss))
        result.density.append(float(density))
        result.accuracy.append(float(np.asarray(accuracy(state[0]))))
        bar.update()
        bar.set_postfix(loss=f"{result.loss[-1]:.3f}", accuracy=f"{result.accuracy[-1]:.2%}")
    return result, state[:2]


def _density(memory: Any) -> jax.Array:
    """Return the running mean of the share of the rows that is kept, of a memory that knows of one."""
    told = msbp.metrics(memory) if memory else {}
    return told.get("@outputs/density", jnp.ones(()))
