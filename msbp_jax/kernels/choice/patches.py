"""Which convolutions run on patches of their input: those for which that is measured to be faster than dense.

There is no cost model of XLA's convolutions. `python -m benchmarks conv` measures a grid, and a test holds what is
chosen here to it: patches of nothing but single positions, which are the input itself; many channels; strides, where
each entry of the input is in fewer windows. Few channels make small products of large patches: up to four times
slower than dense.
"""

from __future__ import annotations

from msbp_jax.kernels.choice import target
from msbp_jax.kernels.native import calls as native_calls

LARGEST_WINDOW = 16  # of those measured


def patches_pay(channels_in: int, channels_out: int, window: int, stride: int) -> bool:
    """Return whether a convolution's backward is measured to be faster on patches than dense, at densities up to 1/4.

    Args:
      channels_in: Features of the input.
      channels_out: Features of the output.
      window: Positions of the kernel.
      stride: Product of the strides.
    """
    if target.platform() != "cpu" or not native_calls.available() or window > LARGEST_WINDOW:
        return False
    if window == 1:
        return channels_in >= 64 and channels_out >= 64
    if stride >= 4:
        return channels_in >= 64 and channels_out >= 128
    return channels_in >= 128 and channels_out >= 128
