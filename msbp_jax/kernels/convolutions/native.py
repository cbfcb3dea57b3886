"""Convolutions with a sparse kernel in native code, float32; one axis of pixels is an image of one row."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.kernels.convolutions.geometry import Geometry, Shape, as_images, two_axes
from msbp_jax.kernels.native import calls
from msbp_jax.weights import Pattern

_MOST_FLOATS = 2**31  # of the planes of a task, which are addressed by 32 bits


def check_size(geometry: Geometry, x: Shape, features: int) -> None:
    """Decline images whose planes cannot be addressed.

    Raises:
      NotImplementedError: They are too large, or have more than two axes of pixels.
    """
    if not 1 <= len(geometry.window) <= 2:
        raise NotImplementedError(f"the native kernels take images of 1 or 2 axes, got {len(geometry.window)}")
    reach = [dilation * window + stride for window, stride, dilation in
             zip(geometry.window, geometry.strides, geometry.dilation, strict=True)]  # fmt: skip
    pitch = x[-2] + 2 * reach[-1] + sum(map(abs, geometry.padding[-1]))
    rows = 1 if len(geometry.window) == 1 else 2 + 2 * reach[0] + sum(map(abs, geometry.padding[0]))
    planes = (x[-1] + features) * math.prod(geometry.strides)
    sizes = (*x[1:], features, *geometry.window, *geometry.strides, *geometry.dilation)
    padding = [abs(pad) for pads in geometry.padding for pad in pads]
    if planes * (4 * rows * pitch + 4096) >= _MOST_FLOATS or max(*sizes, *padding) >= 2**20:
        raise NotImplementedError(f"the native kernels take no images as large as {x} with such a window")


def times(
    x: Float[Array, "images *pixels channels"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    precision: Any,
) -> Float[Array, "images *positions features"]:
    """See `msbp_jax.kernels.convolutions.times`."""
    del precision
    positions = geometry.positions(x.shape[1:-1])
    operands = [values, pattern.starts, pattern.inputs, pattern.order, as_images(x)]
    result = (x.shape[0], *two_axes(positions), pattern.shape[-1])
    y = _call("sparse_convolution", operands, result, geometry, x.shape[0], of_gradient=False)
    return y.reshape(x.shape[0], *positions, pattern.shape[-1])


def input_gradient(
    g: Float[Array, "images *positions features"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    shape: Shape,
    precision: Any,
) -> Float[Array, "images *pixels channels"]:
    """See `msbp_jax.kernels.convolutions.input_gradient`."""
    del precision
    operands = [values, pattern.input_starts, pattern.features, pattern.order, as_images(g)]
    result = (shape[0], *two_axes(shape[1:-1]), shape[-1])
    return _call("sparse_convolution", operands, result, geometry, g.shape[0], of_gradient=True).reshape(shape)


def weight_gradient(
    x: Float[Array, "images *pixels channels"],
    g: Float[Array, "images *positions features"],
    pattern: Pattern,
    geometry: Geometry,
    precision: Any,
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.convolutions.weight_gradient`."""
    del precision
    operands = [as_images(x), as_images(g), pattern.starts, pattern.inputs]
    return _call("sparse_convolution_gradient", operands, (pattern.entries,), geometry, x.shape[0])


def _call(
    name: str, operands: list[jax.Array], result: Shape, geometry: Geometry, images: int, **attributes: Any
) -> jax.Array:
    split = (f"native {name}", images, 1)
    return calls.call(
        name, operands, [(result, jnp.float32)], split=split, axes=geometry.axes, groups=geometry.groups, **attributes
    )[0]
