"""What the demo can be told."""

from __future__ import annotations

import dataclasses
import pathlib

import optax

import msbp_jax as msbp

# Learning rates are those that the field's papers and Optax's own examples use for small networks.
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "sgd": lambda: optax.sgd(0.1),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of the demo.

    Attributes:
      data: Folder with MNIST's IDX files; None for scikit-learn's digits.
      width: Features of each hidden layer.
      depth: Hidden layers.
      batch: Examples of a step.
      epochs: Passes over the training set.
      efficiency: What the rows that are sampled are worth, of the whole batch.
      density: Share of the features that top-k keeps; None if `k` is given.
      k: Number of features that top-k keeps; None if `density` is given.
      rows_per_group: Rows that share a choice; None for the whole batch.
      decay: How much of the residual the memory carries on.
      optimizer: A name of `OPTIMIZERS`.
      seed: Of the parameters and the order of the examples.
      plot: Where the picture goes; None for none.
      json: Where the numbers go; None for nowhere.
    """

    data: pathlib.Path | None
    width: int
    depth: int
    batch: int
    epochs: int
    efficiency: float
    density: float | None
    k: int | None
    rows_per_group: int | None
    decay: float
    optimizer: str
    seed: int
    plot: pathlib.Path | None
    json: pathlib.Path | None

    def methods(self) -> dict[str, msbp.Sparsifier | None]:
        """Return the methods by name; None is plain JAX."""
        plain = msbp.top_k(self.density, k=self.k, rows_per_group=self.rows_per_group)
        return {
            "dense": None,
            "rows": msbp.sample_rows(efficiency=self.efficiency),
            "top-k": plain,
            "MSBP": msbp.memorized(plain, decay=self.decay),
        }
