"""What is compared: dense at four batch sizes, rows sampled at three, uniform rows, dithering, and columns.

Of CNNs there is a `native`, too: dense with the same gradients, of convolutions by native kernels.

`rows 1` samples nothing and shows what the code for it costs. `uniform rows` keeps as many as `rows .95` kept on the
average, drawn without a look at the gradient, through the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

import msbp_jax as msbp
from benchmarks.time_to_accuracy.tasks import Task
from msbp_jax.kernels.residual import takes_part
from msbp_jax.sparsifiers._draw import draw

REFERENCE = "rows .95"
UNIFORM = "uniform rows"  # of the density that the reference had
NAMES = (
    *("dense", "dense B/2", "dense B/4", "dense B/8", "native B/8"),
    *("rows .95", "rows .95 B/4", "rows .95 B/8", "rows .9", "rows 1", UNIFORM),
    *("dithered 4", "dithered 4 B/8", "top-k", "MSBP"),
)  # in the order in which they are run
OF_CONVOLUTIONS = ("native B/8",)


class Method(NamedTuple):
    """A way to train.

    Attributes:
      share: Of the task's batch size.
      plan: What is sparse; None for plain JAX.
      density: What share of the rows is kept, where that is settled beforehand.
    """

    share: float
    plan: msbp.Sparsifier | Mapping[str, msbp.Sparsifier] | None
    density: float | None = None


def make(task: Task, name: str, density: float) -> Method:
    """Return a method.

    Args:
      task: For which.
      name: One of `NAMES`.
      density: What uniform rows keep.
    """
    share, group = task.columns
    top_k = msbp.top_k(density=share, rows_per_group=group)
    return {
        "dense": Method(1, None),
        "dense B/2": Method(1 / 2, None),
        "dense B/4": Method(1 / 4, None),
        "dense B/8": Method(1 / 8, None),
        "native B/8": Method(1 / 8, msbp.dense(native=True)),
        "rows .95": Method(1, msbp.sample_rows(efficiency=0.95)),
        "rows .95 B/4": Method(1 / 4, msbp.sample_rows(efficiency=0.95)),
        "rows .95 B/8": Method(1 / 8, msbp.sample_rows(efficiency=0.95)),
        "rows .9": Method(1, msbp.sample_rows(efficiency=0.9)),
        "rows 1": Method(1, msbp.sample_rows(efficiency=1.0)),
        UNIFORM: Method(1, uniform_rows(density), density),
        "dithered 4": Method(1, msbp.dithered(4)),
        "dithered 4 B/8": Method(1 / 8, msbp.dithered(4)),
        "top-k": Method(1, top_k),
        "MSBP": Method(1, msbp.memorized(top_k, decay=0.8)),
    }[name]


def uniform_rows(density: float) -> msbp.Sparsifier:
    """Return rows drawn alike whatever their gradient, and weighed up."""

    def apply(u: jax.Array, key: jax.Array) -> tuple[msbp.Rows, jax.Array]:
        following, now = jax.random.split(key)
        live = takes_part(u)[:, 0]
        count = max(1, round(density * len(u)))
        weight = draw(now, jnp.ones(len(u)), live, count=count).weight
        return msbp.Rows(u, weight, share=density), following

    return msbp.Sparsifier(
        init=lambda aval: jax.random.key(0), apply=apply, name=f"uniform_rows({density:g})", enters=True
    )
