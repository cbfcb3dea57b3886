"""The backends of `grad_input`. `choice.order` puts them into the order of their expected times."""

from msbp_jax.kernels.choice.dispatch import on_demand
from msbp_jax.kernels.columns.grad_input import dense, native, xla
from msbp_jax.kernels.native import calls

IMPLEMENTATIONS = {
    "gpu": on_demand(f"{__name__}.gpu", "grad_input"),
    "tpu": on_demand(f"{__name__}.tpu", "grad_input"),
    "xla": xla.grad_input,
    "dense": dense.grad_input,
}
if calls.available():
    IMPLEMENTATIONS = {"native": native.grad_input} | IMPLEMENTATIONS
