"""How much of a test set a module tells right."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def percent_right(module: nn.Module, variables: Any, x: jax.Array, y: jax.Array) -> float:
    """Return the share of labels that are told right, in percent, in batches of a thousand taken one by one.

    Args:
      module: From inputs to logits.
      variables: Its variables.
      x: Inputs, examples first.
      y: Labels; what is left over of a batch is left out.
    """
    size = min(1000, len(y))
    right = jax.jit(lambda variables, x, y: (jnp.asarray(module.apply(variables, x)).argmax(-1) == y).mean())
    starts = range(0, len(y) // size * size, size)
    return 100 * float(np.mean([right(variables, x[at : at + size], y[at : at + size]) for at in starts]))
