"""The work of an optimizer's update: it reads and writes parameters and state once, and reads the gradients."""

from __future__ import annotations

from typing import Any

import jax
import optax

from msbp_jax.kernels.choice.costs.equations import bytes_of
from msbp_jax.kernels.choice.costs.work import Work


def work_of_update(optimizer: optax.GradientTransformation, params: Any) -> Work:
    """Return the leaves that are updated, and bytes that are moved.

    Args:
      optimizer: Its `init` says what it keeps; nothing is run.
      params: The parameters; shapes and dtypes are enough.
    """
    state = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    leaves = jax.tree.leaves(params)
    own = sum(map(bytes_of, leaves))
    return {"update": (len(leaves), 3 * own + 2 * sum(map(bytes_of, state)))}
