"""The backward of a dense convolution on the images that are kept, channels last, in native code on a CPU.

A CPU's convolutions within branches of XLA take tens of times as long as outside of them, so that a ladder of sizes
(`rows/ladder`) is no way there. These kernels skip images as they come, whatever their number; nothing is unfolded, and
float32 images are read where they lie.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.kernels.convolutions.geometry import Geometry, Shape, as_images, two_axes
from msbp_jax.kernels.native import calls

_MOST = 2**20  # of any size of an image and its window
_FEWEST = 4  # features: with fewer, most of a register block would be padding


def runs(geometry: Geometry, x: Shape, features: int, *dtypes: Any) -> bool:
    """Return whether the kernels run a convolution here.

    Args:
      geometry: Of the window.
      x: Shape of the images, channels last.
      features: Of the result.
      *dtypes: Of what is passed to them.
    """
    if not calls.runs(*dtypes) or geometry.groups != 1 or not 1 <= len(geometry.window) <= 2 or features < _FEWEST:
        return False
    positions = geometry.positions(x[1:-1])
    if _compat.is_symbolic(*x) or 0 in x or 0 in positions:
        return False
    padding = [abs(pad) for pads in geometry.padding for pad in pads]
    sizes = (*x[1:], *positions, features, *geometry.window, *geometry.strides, *geometry.dilation, *padding)
    return max(sizes) < _MOST and x[0] < 2**31


def taken(array: jax.Array) -> jax.Array:
    """Return an array in a dtype that the kernels take: itself, or as float32, which holds every narrower one."""
    return array if array.dtype in calls.DTYPES else array.astype(jnp.float32)


def grad_input(
    g: Float[Array, "images *positions features"],
    kept: Float[Array, " images"],
    w: Float[Array, "*window channels features"],
    geometry: Geometry,
    pixels: Shape,
) -> Float[Array, "images *pixels channels"]:
    """Return the gradient of the images, float32; 0 for those that are left out.

    Args:
      g: Gradient of the result.
      kept: 0 for an image that is left out, float32.
      w: The kernel.
      geometry: Of the window.
      pixels: Of an image.
    """
    images, channels = g.shape[0], w.shape[-2]
    operands = [as_images(g), kept, w.reshape(*two_axes(geometry.window), *w.shape[-2:])]
    result = (images, *two_axes(pixels), channels)
    axes = "i P Q n, i, A B m n -> i H W m"
    dx = _call("images_grad_input", operands, result, geometry, axes)
    return dx.reshape(images, *pixels, channels)


def grad_weight(
    g: Float[Array, "images *positions features"],
    kept: Float[Array, " images"],
    x: Float[Array, "images *pixels channels"],
    geometry: Geometry,
) -> Float[Array, "*window channels features"]:
    """Return the gradient of the kernel, float32, to which images that are left out add nothing.

    Args:
      g: Gradient of the result.
      kept: 0 for an image that is left out, float32.
      x: The images.
      geometry: Of the window.
    """
    channels, features = x.shape[-1], g.shape[-1]
    result = (*two_axes(geometry.window), channels, features)
    axes = "i P Q n, i, i H W m -> A B m n"
    dw = _call("images_grad_weight", [as_images(g), kept, as_images(x)], result, geometry, axes)
    return dw.reshape(*geometry.window, channels, features)


def _call(name: str, operands: list[jax.Array], result: Shape, geometry: Geometry, axes: str) -> jax.Array:
    return calls.call(name, operands, [(result, jnp.float32)], by=axes, axes=geometry.axes)[0]
