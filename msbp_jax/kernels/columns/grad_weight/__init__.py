"""The backends of `grad_weight`. `choice.order` puts them into the order of their expected times."""

from msbp_jax.kernels.choice.dispatch import registry
from msbp_jax.kernels.columns.grad_weight import dense, native, xla

IMPLEMENTATIONS = registry(__name__, "grad_weight", native.grad_weight, xla=xla.grad_weight, dense=dense.grad_weight)
