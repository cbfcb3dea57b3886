"""Which backends may be timed on this machine.

By their names the Pallas kernels run on a CPU too, but interpreted, for tests: a time of theirs there says nothing.
"""

from __future__ import annotations

import jax

from msbp_jax import kernels

_PLATFORMS = {"native": "cpu", "gpu": "gpu", "tpu": "tpu"}


def compiled(op: str) -> tuple[str, ...]:
    """Return the backends of an op that are compiled for the platform that JAX runs on, in order of preference.

    Args:
      op: A name in `msbp_jax.backends()`.
    """
    platform = jax.default_backend()
    return tuple(name for name in kernels.backends()[op] if _PLATFORMS.get(name, platform) == platform)
