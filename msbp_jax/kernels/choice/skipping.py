"""Up to which share of what is kept the products that skip the rest are faster than dense ones."""

from __future__ import annotations

from msbp_jax.formats import Entries, Format, Size
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.native import calls as native_calls

_ROWS = 0.75
_ENTRIES = 1 / 3


def pays_below(p: Format, rows: Size, m: int, n: int) -> float:
    """Return the share of the rows, or of the entries, below which the products of the kept ones pay; 0 for never.

    Args:
      p: The cotangent; what it is, is enough.
      rows: As in `Layer`, as `m` and `n`.
      m: Input features.
      n: Output features.
    """
    del rows, m, n
    if isinstance(p, Entries):  # only native kernels skip single entries
        return _ENTRIES if skips_natively() else 0.0
    return _ROWS


def skips_natively() -> bool:
    """Whether native kernels skip what is 0, of a dtype that they take, on the device that the program is for."""
    return native_calls.available() and target.platform() == "cpu"
