"""What every Pallas kernel needs, on a TPU and on a GPU.

Nothing imports this folder, or Pallas, before a backend of it runs: see `choice.dispatch.registry`.
"""
