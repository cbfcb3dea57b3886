"""The backends of `row_moments` for `Entries`, in the order in which they are tried."""

from msbp_jax.kernels.entries.row_moments import native, xla
from msbp_jax.kernels.native import calls

_BUILT = {"native": native.row_moments} if calls.available() else {}
IMPLEMENTATIONS = {**_BUILT, "xla": xla.row_moments}
