"""The backends of `grad_input`. `choice.order` puts them into the order of their expected times."""

from msbp_jax.kernels.choice.dispatch import registry
from msbp_jax.kernels.columns.grad_input import dense, native, xla

IMPLEMENTATIONS = registry(__name__, "grad_input", native.grad_input, xla=xla.grad_input, dense=dense.grad_input)
