"""Up to which share of what is kept the products that skip the rest are faster than dense ones."""

from __future__ import annotations

from msbp_jax import _compat
from msbp_jax.formats import Entries, Format
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.native import calls as native_calls

_ROWS = 0.75
_ENTRIES = 1 / 3


def pays_below(p: Format) -> float:
    """Return the share of the rows, or of the entries, below which the products of the kept ones pay; 0 for never.

    Args:
      p: The cotangent; shapes and dtypes are enough.
    """
    if not isinstance(p, Entries):
        return _ROWS
    rows, n = p.values.shape[-2:]  # under vmap there is a batch axis before
    few = not _compat.is_symbolic(rows) and rows * n < native_calls.MOST_ENTRIES
    # Only the native kernels skip single entries.
    return _ENTRIES if skips_natively() and few and p.values.dtype in native_calls.DTYPES else 0.0


def skips(p: Format) -> bool:
    """Whether products leave out what is not kept, if need be as the run tells."""
    kept = p.kept_share()
    return pays_below(p) > 0 if kept is None else kept < pays_below(p)


def skips_natively() -> bool:
    """Whether native kernels skip what is 0, of a dtype that they take, on the device that the program is for."""
    return native_calls.available() and target.platform() == "cpu"
