"""What msbp_jax costs and saves, beside plain JAX and PyTorch. `python -m benchmarks --help`."""
