"""The backends of `grad_weight` for `Entries`, in the order in which they are tried. XLA's is the dense one."""

from msbp_jax.kernels.entries.grad_weight import native, xla
from msbp_jax.kernels.native import calls

_BUILT = {"native": native.grad_weight} if calls.available() else {}
IMPLEMENTATIONS = {**_BUILT, "xla": xla.grad_weight, "dense": xla.grad_weight}
