"""The variance of the structure's gradient over mini-batches and draws, beside policy gradients of as many forwards.

VR-PGE takes the difference of two losses; without a baseline each loss counts as it is, and with a running mean the
mean of the losses before is taken off. All are means over two samples, at alpha = 1/2, of the same draws.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import msbp_jax as msbp
from benchmarks.subnetwork import methods
from benchmarks.subnetwork.tasks import Task, loss_fn

DRAWS = 300
DECAY = 0.9  # of the running mean


def measure(task: Task, share: float) -> list[dict[str, Any]]:
    """Return the variances, summed over units, at the start and after an epoch.

    Args:
      task: What is trained.
      share: Of the units.
    """
    variables = task.init(task.widths, 0)
    sub = msbp.subnetwork(task.build, units=task.units(variables), widths=dict(task.widths), budget=share)
    tx = task.optimizer(task.epochs)
    params, stats = methods.split(variables)
    state: Any = jax.tree.map(jnp.copy, (params, stats, tx.init(params), sub.init(variables)))
    step = jax.jit(methods.narrow_step(sub, tx), donate_argnums=0)
    x, y = jnp.asarray(task.images.train_x), jnp.asarray(task.images.train_y)
    rows, sample = [_told(sub, task, state, "0")], None
    for at, batch in enumerate(task.order(0, 0)):
        sample = sub.sample(state[3], jax.random.key(at), sample)
        state, _ = step(state, sample, x[batch], y[batch])
    return [*rows, _told(sub, task, state, "1")]


def _told(sub: msbp.Subnetwork, task: Task, state: Any, epochs: str) -> dict[str, Any]:
    params, stats, _, structure = state
    value = jax.jit(sub.value_and_grad(loss_fn, has_aux=True))
    turned = lambda sample: sample.replace(first=sample.second, second=sample.first)
    s = np.concatenate([np.asarray(structure.probabilities[name]) for name in sorted(structure.probabilities)])
    spread = np.sqrt(s * (1 - s))
    x, y = jnp.asarray(task.images.train_x), jnp.asarray(task.images.train_y)
    order, units, sample, mean = task.order(1, 0), sub.units({"params": params, **stats}), None, None
    found: dict[str, list[np.ndarray]] = {"VR-PGE": [], "no baseline": [], "running mean": []}
    for at in range(DRAWS):
        batch = order[at % len(order)]
        sample = sub.sample(structure, jax.random.key(1000 + at), sample)
        args = structure, sample, stats, x[batch], y[batch]
        losses = [float(value(params, args[0], of, *args[2:])[0][0]) for of in (sample, turned(sample))]
        masks = [
            np.concatenate([np.asarray(mask) for _, mask in sorted(of.masks(units, drawn=True).items())])
            for of in (sample.first, sample.second)
        ]
        score = [(mask - s) / np.where(spread == 0, 1, spread) for mask in masks]
        mean = np.mean(losses) if mean is None else mean
        found["VR-PGE"].append((losses[0] - losses[1]) * (score[0] - score[1]) / 2)
        found["no baseline"].append(sum(loss * of for loss, of in zip(losses, score, strict=True)) / 2)
        found["running mean"].append(sum((loss - mean) * of for loss, of in zip(losses, score, strict=True)) / 2)
        mean = DECAY * mean + (1 - DECAY) * np.mean(losses)
    total = {name: float(np.var(values, axis=0).sum()) for name, values in found.items()}
    return (
        {"after epochs": epochs}
        | {name: float(f"{value:.3g}") for name, value in total.items()}
        | {f"{name} / VR-PGE": round(total[name] / total["VR-PGE"], 2) for name in ("no baseline", "running mean")}
    )
