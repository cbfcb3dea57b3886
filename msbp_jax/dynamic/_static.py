"""A pattern that stays: the schedule of a loop that is written for any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from msbp_jax.dynamic._schedule import DenseGradFn, SparsitySchedule, SparsityState, check_still_sparse, started


def static_sparsity() -> SparsitySchedule:
    """Return the schedule under which patterns stay as `msbp.prune` made them.

        S_t = S_0

    So that a loop is written once for all schedules.

    Returns:
      A schedule whose `update` counts steps, inside `jit` or outside.

    Example:
      >>> import jax.numpy as jnp, optax, msbp_jax as msbp
      >>> variables = msbp.prune({"params": {"kernel": jnp.ones((3, 4))}}, density=0.25)
      >>> schedule, tx = msbp.static_sparsity(), optax.sgd(0.1)
      >>> opt_state, state = tx.init(variables["params"]), schedule.init(variables)
      >>> variables, opt_state, state = schedule.update(tx, variables, opt_state, state)
      >>> int(state.step), schedule.due(state)
      (1, False)

    References:
      Nikdan et al., SparseProp, 2023 (arXiv 2302.04852), for training of sparse weights.
    """
    return Static()


@dataclasses.dataclass(frozen=True)
class Static(SparsitySchedule):
    """Nothing changes."""

    def init(self, variables: Mapping[str, Any], key: jax.Array | None = None) -> SparsityState:
        """Return the state before the first step; see `SparsitySchedule.init`."""
        return started(variables, key)

    def due(self, state: SparsityState) -> bool:
        """Return False."""
        del state
        return False

    def update(
        self,
        tx: Any,
        variables: Mapping[str, Any],
        opt_state: Any,
        state: SparsityState,
        dense_grad_fn: DenseGradFn | None = None,
    ) -> tuple[dict[str, Any], Any, SparsityState]:
        """Count a step; see `SparsitySchedule.update`."""
        del tx, dense_grad_fn
        self._check_sizes(variables, state)
        check_still_sparse(variables, state)
        return dict(variables), opt_state, state._replace(step=state.step + 1)
