"""How a window moves over images whose channels stand last, and how large what it makes is."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from msbp_jax.formats import Size

type Shape = tuple[Size, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A convolution of images `[images, *pixels, channels]` with a kernel `[*window, channels / groups, features]`.

    Attributes:
      window: Places along each axis of the pixels, one number an axis, as all below.
      strides: Pixels from one window to the next.
      padding: Zeros before and behind, negative to cut off.
      dilation: Pixels from one place of the window to the next.
      groups: Of channels, each of which makes its own features.
    """

    window: Shape
    strides: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape
    groups: int = 1

    def positions(self, pixels: Shape) -> Shape:
        """Return how many windows there are along each axis."""
        sizes = zip(pixels, self.window, self.strides, self.padding, self.dilation, strict=True)
        return tuple(
            max(0, (size + sum(pad) - (window - 1) * dilation - 1) // stride + 1)
            for size, window, stride, pad, dilation in sizes
        )

    @property
    def axes(self) -> np.ndarray:
        """What native kernels are told of two axes of pixels: window, stride, dilation, zeros before the first."""
        axes = [
            (window, stride, dilation, pad[0])
            for window, stride, pad, dilation in zip(
                self.window, self.strides, self.padding, self.dilation, strict=True
            )
        ]
        return np.asarray([(1, 1, 1, 0)] * (2 - len(axes)) + axes, np.int64).ravel()


def as_images(x: jax.Array) -> jax.Array:
    """Return images of two axes of pixels: one axis is an image of one row."""
    return x if x.ndim == 4 else x[:, None]


def two_axes(sizes: Shape) -> Shape:
    """Return the sizes of two axes of pixels, or of a window's."""
    return sizes if len(sizes) == 2 else (1, *sizes)
