"""The backends of `grad_weight`, in the order in which they are tried; the reference comes last."""

from msbp_jax.kernels.grad_weight import xla

IMPLEMENTATIONS = {"xla": xla.grad_weight}
