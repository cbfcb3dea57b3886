"""The backends of `grad_input` for `Rows`, in the order in which they are tried."""

from msbp_jax.kernels.native import calls
from msbp_jax.kernels.rows.grad_input import dense, native, xla

_BUILT = {"native": native.grad_input} if calls.available() else {}
IMPLEMENTATIONS = {**_BUILT, "xla": xla.grad_input, "dense": dense.grad_input}
