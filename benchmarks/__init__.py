"""What msbp_jax costs and saves, beside plain JAX and PyTorch. `python -m benchmarks --help`."""

from benchmarks.suite import convolutions

__all__ = ["convolutions"]  # a test of the library holds its choice for convolutions to these layers
