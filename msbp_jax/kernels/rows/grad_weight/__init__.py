"""The backends of `grad_weight` for `Rows`, in the order in which they are tried."""

from msbp_jax.kernels.native import calls
from msbp_jax.kernels.rows.grad_weight import dense, native, xla

_BUILT = {"native": native.grad_weight} if calls.available() else {}
IMPLEMENTATIONS = {**_BUILT, "xla": xla.grad_weight, "dense": dense.grad_weight}
