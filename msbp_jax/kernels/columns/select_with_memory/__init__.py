"""The backends of `select_with_memory`; `choice.order` puts them into an order, in which the reference comes last."""

from msbp_jax.kernels.choice.dispatch import registry
from msbp_jax.kernels.columns.select_with_memory import native, xla

IMPLEMENTATIONS = registry(__name__, "select_with_memory", native.select_with_memory, xla=xla.select_with_memory)
