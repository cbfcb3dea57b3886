"""SET: the smallest entries give way to places that are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax.dynamic._fixed import Exchange, Fraction, check_exchange
from msbp_jax.dynamic._schedule import DenseGradFn, SparsitySchedule
from msbp_jax.weights import Pattern


def sparse_evolution(*, every: int, until: int | None = None, fraction: Fraction = 0.3) -> SparsitySchedule:
    """Return the schedule of sparse evolutionary training (SET): drop the smallest weights, grow anywhere.

        drop  floor(fraction entries) of the smallest |w|,   grow as many, drawn alike among the places without an entry

    The number of entries of each weight, and so every shape, stays: `update` belongs inside the compiled step, which is
    compiled once. A place that was just dropped is not drawn in the same step; of a weight that is nearly full, fewer
    are dropped. New weights begin at 0.

    Args:
      every: Steps between changes; an epoch in the paper.
      until: The step from which on nothing changes; None for never.
      fraction: Share of the entries of each weight that is dropped, or an Optax schedule, a function of the step.

    Returns:
      A schedule. Its `init` takes variables of `msbp.prune` and a key; its `update` calls no gradient.

    Raises:
      TypeError: A number of steps that is not whole.
      ValueError: A share out of [0, 1], or an end before the first change.

    Example:
      >>> import jax, jax.numpy as jnp, optax, msbp_jax as msbp
      >>> variables = msbp.prune({"params": {"kernel": jnp.arange(16.0).reshape(4, 4)}}, density=0.25)
      >>> schedule, tx = msbp.sparse_evolution(every=1, fraction=0.5), optax.sgd(0.1)
      >>> opt_state, state = tx.init(variables["params"]), schedule.init(variables, jax.random.key(0))
      >>> variables, opt_state, state = jax.jit(lambda *carry: schedule.update(tx, *carry))(variables, opt_state, state)
      >>> sorted(variables["params"]["kernel"].tolist())  # 12 and 13 were dropped
      [0.0, 0.0, 14.0, 15.0]

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
      network science, 2018 (arXiv 1707.04780).
    """
    return SparseEvolution(*check_exchange(every, until, fraction))


@dataclasses.dataclass(frozen=True)
class SparseEvolution(Exchange):
    """Places are worth what is drawn."""

    draws = True

    def scores(
        self,
        variables: Mapping[str, Any],
        patterns: Mapping[str, Pattern],
        key: jax.Array | None,
        dense_grad_fn: DenseGradFn | None,
    ) -> dict[str, jax.Array]:
        """Return uniform numbers, of a key for each weight."""
        del variables, dense_grad_fn
        assert key is not None
        keys = jax.random.split(key, max(1, len(patterns)))
        shapes = {name: (*pattern.stacked, *pattern.shape) for name, pattern in patterns.items()}
        return {
            name: jax.random.uniform(own, shape, jnp.float32)
            for own, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
