"""The backends of `grad_weight`. `_choose` puts them into the order of their expected times."""

from msbp_jax.kernels import _native_calls
from msbp_jax.kernels.grad_weight import dense, gpu, native, tpu, xla

IMPLEMENTATIONS = {"gpu": gpu.grad_weight, "tpu": tpu.grad_weight, "xla": xla.grad_weight, "dense": dense.grad_weight}
if _native_calls.available():
    IMPLEMENTATIONS = {"native": native.grad_weight} | IMPLEMENTATIONS
