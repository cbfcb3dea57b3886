"""What stands around a call that XLA and JAX cannot look into, native or Pallas: devices, derivatives, files."""
