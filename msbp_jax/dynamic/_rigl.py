"""RigL: the smallest entries give way to the places where the dense gradient is largest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax import _checks
from msbp_jax.dynamic._fixed import Exchange, Fraction, check_exchange
from msbp_jax.dynamic._schedule import DenseGradFn, SparsitySchedule, leaves_of
from msbp_jax.weights import Pattern, densify


def rigl(*, every: int, until: int, fraction: Fraction = 0.3) -> SparsitySchedule:
    """Return the schedule of RigL: drop the smallest weights, grow where the dense gradient is largest.

        drop  floor(f(t) entries) of the smallest |w|,   grow as many of the largest |dL/dW| elsewhere
        f(t) = fraction / 2 (1 + cos(pi t / until)),     t = every, 2 every, .. < until

    The number of entries of each weight, and so every shape, stays: `update` belongs inside the compiled step, which is
    compiled once. The dense gradient is computed at the steps that are due, within a branch of the program.

    As in the authors' code, places are chosen among all but the entries that are kept: one that was just dropped
    may be chosen again, and then stays as it is, with its moments. So it does where nothing else has a gradient:
    those that are 0 or not finite choose nothing.

    On many devices the dense gradient has to be that of all of them (`pmean` within `shard_map`), or each chooses for
    itself. A convolution in a branch of XLA's takes tens of times as long on a CPU: there call `update` after the
    compiled step, with a compiled `dense_grad_fn`, which costs a millisecond or two at steps that are not due.

    Args:
      every: Steps between changes, 100 in the paper.
      until: The step from which on nothing changes, three quarters of the training in the paper.
      fraction: Share of the entries of each weight that is dropped at first, which decays to 0 by a cosine; or an Optax
        schedule, a function of the step, which does not.

    Returns:
      A schedule. Its `init` takes variables of `msbp.prune`, and no key; its `update` needs
      `dense_grad_fn(dense_params) -> dense_grads`, of the plain model on this step's batch.

    Raises:
      TypeError: A number of steps that is not whole.
      ValueError: A share out of [0, 1], or an end before the first change.

    Example:
      >>> import jax, jax.numpy as jnp, optax, msbp_jax as msbp
      >>> f = lambda params, x: x @ params["kernel"]
      >>> x, y = jnp.eye(4), jnp.arange(16.0).reshape(4, 4)
      >>> variables = msbp.prune({"params": {"kernel": jnp.ones((4, 4))}}, density=0.25)
      >>> schedule, tx = msbp.rigl(every=1, until=100, fraction=0.5), optax.sgd(0.1)
      >>> opt_state, state = tx.init(variables["params"]), schedule.init(variables)
      >>> dense_grad_fn = jax.grad(lambda dense: ((f(dense, x) - y) ** 2).sum())
      >>> variables, opt_state, state = jax.jit(
      ...     lambda *carry: schedule.update(tx, *carry, dense_grad_fn)
      ... )(variables, opt_state, state)
      >>> variables["sparsity"]["kernel"].mask().astype(int).sum(axis=1).tolist()  # one was dropped: floor(.4998 x 4)
      [3, 0, 0, 1]

    References:
      Evci et al., Rigging the lottery: making all tickets winners, 2019 (arXiv 1911.11134).
    """
    return RigL(*check_exchange(every, _checks.positive_int("until", until, "the last step"), fraction))


@dataclasses.dataclass(frozen=True)
class RigL(Exchange):
    """Places are worth the magnitude of the dense gradient."""

    regrow = True

    def share(self, step: jax.Array) -> jax.Array:
        """Return the share of the entries that is dropped at a step: half a wave of a cosine, or as the user says."""
        if callable(self.fraction) or self.until is None:
            return super().share(step)
        angle = jnp.float32(np.pi / self.until) * jnp.asarray(step).astype(jnp.float32)
        return jnp.float32(self.fraction / 2) * (1 + jnp.cos(angle))

    def scores(
        self,
        variables: Mapping[str, Any],
        patterns: Mapping[str, Pattern],
        key: jax.Array | None,
        dense_grad_fn: DenseGradFn | None,
    ) -> dict[str, jax.Array]:
        """Return magnitudes of the dense gradient.

        Raises:
          ValueError: There is no function that computes it, or it is of other parameters.
        """
        del key
        assert dense_grad_fn is not None
        dense = densify(variables)["params"]
        found, expected = leaves_of(dense_grad_fn(dense)), leaves_of(dense)
        scores = {}
        for name in patterns:
            shape = np.shape(expected[name])
            if name not in found or np.shape(found[name]) != shape:
                got = f"one of shape {np.shape(found[name])}" if name in found else f"gradients of {', '.join(found)}"
                raise ValueError(
                    f"dense_grad_fn must return the gradient of all parameters that it is given, as jax.grad does: of "
                    f"{name} one of shape {shape} was expected, got {got}. Take the loss of the plain model there."
                )
            scores[name] = jnp.abs(found[name])
        return scores

    def update(
        self, tx: Any, variables: Any, opt_state: Any, state: Any, dense_grad_fn: DenseGradFn | None = None
    ) -> Any:
        """Count a step; if it is due, exchange entries. Works under `jit`; see `SparsitySchedule.update`."""
        if not callable(dense_grad_fn):
            raise ValueError(
                "RigL grows by the dense gradient: update(tx, variables, opt_state, state, dense_grad_fn) needs a "
                f"function dense_grad_fn(dense_params) -> dense_grads, got {dense_grad_fn!r}."
            )
        return super().update(tx, variables, opt_state, state, dense_grad_fn)
