"""Dense convolutions with a kernel that native code makes of its entries, on a CPU, where lists do not pay."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from msbp_jax.kernels.convolutions import xla
from msbp_jax.kernels.convolutions.geometry import Geometry, Shape
from msbp_jax.kernels.weights.unpacked import packed, unpacked
from msbp_jax.weights import Pattern


def times(
    x: Float[Array, "images *pixels channels"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    precision: Any,
) -> Float[Array, "images *positions features"]:
    """See `msbp_jax.kernels.convolutions.times`."""
    return xla.dense(x, unpacked(values, pattern).reshape(pattern.shape), geometry, precision)


def input_gradient(
    g: Float[Array, "images *positions features"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    shape: Shape,
    precision: Any,
) -> Float[Array, "images *pixels channels"]:
    """See `msbp_jax.kernels.convolutions.input_gradient`."""
    return xla.dense_input_gradient(g, unpacked(values, pattern).reshape(pattern.shape), geometry, shape, precision)


def weight_gradient(
    x: Float[Array, "images *pixels channels"],
    g: Float[Array, "images *positions features"],
    pattern: Pattern,
    geometry: Geometry,
    precision: Any,
) -> Float[Array, " entries"]:
    """See `msbp_jax.kernels.convolutions.weight_gradient`."""
    whole = xla.dense_weight_gradient(x, g, pattern.shape, geometry, precision)
    return packed(whole.reshape(pattern.matrix_shape), pattern)
