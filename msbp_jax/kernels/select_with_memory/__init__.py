"""The backends of `select_with_memory`, in the order in which they are tried; the reference comes last."""

from msbp_jax.kernels import _native_calls
from msbp_jax.kernels.select_with_memory import native, xla

IMPLEMENTATIONS = {"xla": xla.select_with_memory}
if _native_calls.available():
    IMPLEMENTATIONS = {"native": native.select_with_memory} | IMPLEMENTATIONS
