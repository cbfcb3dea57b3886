"""The backends of `select_with_memory`; `choice.order` puts them into an order, in which the reference comes last."""

from msbp_jax.kernels.choice.dispatch import on_demand
from msbp_jax.kernels.columns.select_with_memory import native, xla
from msbp_jax.kernels.native import calls

IMPLEMENTATIONS = {
    "gpu": on_demand(f"{__name__}.gpu", "select_with_memory"),
    "tpu": on_demand(f"{__name__}.tpu", "select_with_memory"),
    "xla": xla.select_with_memory,
}
if calls.available():
    IMPLEMENTATIONS = {"native": native.select_with_memory} | IMPLEMENTATIONS
