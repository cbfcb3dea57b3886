"""When XLA, on a CPU, may start what is done with gradients."""

from __future__ import annotations

from typing import Any

import jax

from msbp_jax.kernels.choice import target
from msbp_jax.kernels.native import calls as native_calls


def all_at_once(tree: Any) -> Any:
    """Return results of a backward pass that, on a CPU with the native kernels, are there all together or not at all.

    XLA would update a parameter as soon as its gradient is there, in a thread that the kernels of the next layer then
    lack: a step took 2 to 7 % longer so.
    """
    held = target.platform() == "cpu" and native_calls.available()
    return jax.lax.optimization_barrier(tree) if held else tree
