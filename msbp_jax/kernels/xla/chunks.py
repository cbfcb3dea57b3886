"""How many groups to treat at once, so that a gathered block stays within a budget."""

from __future__ import annotations

from msbp_jax import _compat
from msbp_jax.formats import Size
from msbp_jax.kernels.choice import target

# The most that a block of gathered rows, or of rows to be scattered, may take. Such blocks still fit the last-level
# cache of the machines measured (32 MiB); with much smaller ones, the loop costs more than the cache saves.
BUDGET_BYTES = 16 * 2**20
# Accelerators want few large calls, and have no cache that a block would fit.
ACCELERATOR_BUDGET_BYTES = 2**30


def groups_at_once(groups: Size, bytes_per_group: Size) -> Size:
    """Return how many of `groups` groups fit the budget: all of them, or the fewest equal chunks that do.

    Args:
      groups: `G`.
      bytes_per_group: Size of the block that one group needs, in bytes.

    Returns:
      Between 1 and `groups`.
    """
    if _compat.is_symbolic(groups):
        return groups
    budget = BUDGET_BYTES if target.platform() == "cpu" else ACCELERATOR_BUDGET_BYTES
    limit = max(1, budget // max(1, bytes_per_group))
    if groups <= limit:
        return groups
    chunks = -(-groups // limit)
    return -(-groups // chunks)
