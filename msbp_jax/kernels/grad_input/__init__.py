"""The backends of `grad_input`, in the order in which they are tried; the reference comes last."""

from msbp_jax.kernels.grad_input import xla

IMPLEMENTATIONS = {"xla": xla.grad_input}
