"""The reference of convolutions with a sparse kernel: dense ones, of the kernel with its zeros."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

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
    return _dense(x, scattered(pattern, values), geometry, precision)


def input_gradient(
    g: Float[Array, "images *positions features"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    shape: Shape,
    precision: Any,
) -> Float[Array, "images *pixels channels"]:
    """See `msbp_jax.kernels.convolutions.input_gradient`."""
    w = scattered(pattern, values)
    of_x = jax.linear_transpose(lambda x: _dense(x, w, geometry, precision), jax.ShapeDtypeStruct(shape, w.dtype))
    return of_x(g.astype(w.dtype))[0]


def weight_gradient(
    x: Float[Array, "images *pixels channels"],
    g: Float[Array, "images *positions features"],
    pattern: Pattern,
    geometry: Geometry,
    precision: Any,
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.convolutions.weight_gradient`."""
    kernel = jax.ShapeDtypeStruct(pattern.shape, x.dtype)
    of_w = jax.linear_transpose(lambda w: _dense(x, w, geometry, precision), kernel)
    return gathered(pattern, of_w(g.astype(x.dtype))[0])


def _dense(x: jax.Array, w: jax.Array, geometry: Geometry, precision: Any) -> jax.Array:
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
    )
