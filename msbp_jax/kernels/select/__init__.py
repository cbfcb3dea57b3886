"""The backends of `select`; `_choose` puts them into an order, in which the reference comes last."""

from msbp_jax.kernels import _native_calls
from msbp_jax.kernels.select import gpu, native, tpu, xla

IMPLEMENTATIONS = {"gpu": gpu.select, "tpu": tpu.select, "xla": xla.select}
if _native_calls.available():
    IMPLEMENTATIONS = {"native": native.select} | IMPLEMENTATIONS
