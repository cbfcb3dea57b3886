"""The reference of convolutions with a sparse kernel: dense ones, of the kernel with its zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.formats import accumulation_dtype
from msbp_jax.kernels.convolutions.geometry import Geometry, Shape
from msbp_jax.weights import Pattern, gathered, scattered


def times(
    x: Float[Array, "images *pixels channels"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    precision: Any,
) -> Float[Array, "images *positions features"]:
    """See `msbp_jax.kernels.convolutions.times`."""
    return dense(x, scattered(pattern, values), geometry, precision)


def input_gradient(
    g: Float[Array, "images *positions features"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    shape: Shape,
    precision: Any,
) -> Float[Array, "images *pixels channels"]:
    """See `msbp_jax.kernels.convolutions.input_gradient`."""
    return dense_input_gradient(g, scattered(pattern, values), geometry, shape, precision)


def weight_gradient(
    x: Float[Array, "images *pixels channels"],
    g: Float[Array, "images *positions features"],
    pattern: Pattern,
    geometry: Geometry,
    precision: Any,
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.convolutions.weight_gradient`."""
    return gathered(pattern, dense_weight_gradient(x, g, pattern.shape, geometry, precision))


def dense(x: jax.Array, w: jax.Array, geometry: Geometry, precision: Any) -> jax.Array:
    """Return the convolution in the dtype of its sums."""
    return _convolution(x, w, geometry, precision, accumulation_dtype(x.dtype, w.dtype))


def dense_input_gradient(
    g: jax.Array, w: jax.Array, geometry: Geometry, shape: Shape, precision: Any
) -> Float[Array, "images *pixels channels"]:
    """Return the gradient of images of a shape, in the dtype of `g`, which is that of the sums if one was asked for."""
    w = w.astype(g.dtype)
    return _pulled_back(lambda x: _convolution(x, w, geometry, precision, None), shape, w, g)


def dense_weight_gradient(
    x: jax.Array, g: jax.Array, shape: Shape, geometry: Geometry, precision: Any
) -> Float[Array, ...]:
    """Return the gradient of a kernel of a shape, in the dtype of `g`, as that of the images is."""
    x = x.astype(g.dtype)
    return _pulled_back(lambda w: _convolution(x, w, geometry, precision, None), shape, x, g)


def _pulled_back(linear: Callable[[jax.Array], jax.Array], shape: Shape, like: jax.Array, g: jax.Array) -> jax.Array:
    """Return the gradient at the argument of a linear function, which varies over mesh axes as another array does."""
    anywhere = _compat.varying_like(jnp.zeros(shape, like.dtype), like)
    found: jax.Array = jax.vjp(linear, anywhere)[1](g)[0]
    return found


def _convolution(x: jax.Array, w: jax.Array, geometry: Geometry, precision: Any, dtype: Any) -> jax.Array:
    pixels = "HW"[: len(geometry.window)]
    return lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{pixels}C", f"{pixels}IO", f"N{pixels}C"),
        feature_group_count=geometry.groups,
        precision=precision,
        preferred_element_type=dtype,
    )
