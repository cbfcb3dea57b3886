"""The backends of `dither` for `Entries`, in the order in which they are tried."""

from msbp_jax.kernels.entries.dither import native, xla
from msbp_jax.kernels.native import calls

_BUILT = {"native": native.dither} if calls.available() else {}
IMPLEMENTATIONS = {**_BUILT, "xla": xla.dither}
