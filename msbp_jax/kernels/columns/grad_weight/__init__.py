"""The backends of `grad_weight`. `choice.order` puts them into the order of their expected times."""

from msbp_jax.kernels.choice.dispatch import on_demand
from msbp_jax.kernels.columns.grad_weight import dense, native, xla
from msbp_jax.kernels.native import calls

IMPLEMENTATIONS = {
    "gpu": on_demand(f"{__name__}.gpu", "grad_weight"),
    "tpu": on_demand(f"{__name__}.tpu", "grad_weight"),
    "xla": xla.grad_weight,
    "dense": dense.grad_weight,
}
if calls.available():
    IMPLEMENTATIONS = {"native": native.grad_weight} | IMPLEMENTATIONS
