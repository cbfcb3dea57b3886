"""The backends of `select`; `choice.order` puts them into an order, in which the reference comes last."""

from msbp_jax.kernels.choice.dispatch import on_demand
from msbp_jax.kernels.columns.select import native, xla
from msbp_jax.kernels.native import calls

IMPLEMENTATIONS = {
    "gpu": on_demand(f"{__name__}.gpu", "select"),
    "tpu": on_demand(f"{__name__}.tpu", "select"),
    "xla": xla.select,
}
if calls.available():
    IMPLEMENTATIONS = {"native": native.select} | IMPLEMENTATIONS
