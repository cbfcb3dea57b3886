"""The backends of `select_with_memory`; `_choose` puts them into an order, in which the reference comes last."""

from msbp_jax.kernels import _native_calls
from msbp_jax.kernels.select_with_memory import gpu, native, tpu, xla

IMPLEMENTATIONS = {"gpu": gpu.select_with_memory, "tpu": tpu.select_with_memory, "xla": xla.select_with_memory}
if _native_calls.available():
    IMPLEMENTATIONS = {"native": native.select_with_memory} | IMPLEMENTATIONS
