"""The backends of `select`; `choice.order` puts them into an order, in which the reference comes last."""

from msbp_jax.kernels.choice.dispatch import registry
from msbp_jax.kernels.columns.select import native, xla

IMPLEMENTATIONS = registry(__name__, "select", native.select, xla=xla.select)
