"""The backends of `select`, in the order in which they are tried; the reference comes last."""

from msbp_jax.kernels.select import xla

IMPLEMENTATIONS = {"xla": xla.select}
