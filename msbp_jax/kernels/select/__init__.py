"""The backends of `select`, in the order in which they are tried; the reference comes last."""

from msbp_jax.kernels import _native_calls
from msbp_jax.kernels.select import native, xla

IMPLEMENTATIONS = {"xla": xla.select}
if _native_calls.available():
    IMPLEMENTATIONS = {"native": native.select} | IMPLEMENTATIONS
