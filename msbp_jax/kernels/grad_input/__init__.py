"""The backends of `grad_input`. `_choose` puts them into the order of their expected times."""

from msbp_jax.kernels import _native_calls
from msbp_jax.kernels.grad_input import dense, gpu, native, tpu, xla

IMPLEMENTATIONS = {"gpu": gpu.grad_input, "tpu": tpu.grad_input, "xla": xla.grad_input, "dense": dense.grad_input}
if _native_calls.available():
    IMPLEMENTATIONS = {"native": native.grad_input} | IMPLEMENTATIONS
