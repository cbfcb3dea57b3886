"""The backends of `grad_input` for `Entries`, in the order in which they are tried. XLA's is the dense one."""

from msbp_jax.kernels.entries.grad_input import native, xla
from msbp_jax.kernels.native import calls

_BUILT = {"native": native.grad_input} if calls.available() else {}
IMPLEMENTATIONS = {**_BUILT, "xla": xla.grad_input, "dense": xla.grad_input}
