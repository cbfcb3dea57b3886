"""Convolutions with a sparse kernel as dense ones, of the kernel with its zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.formats import accumulation_dtype
from msbp_jax.kernels.convolutions.geometry import Geometry, Shape
from msbp_jax.kernels.weights import dense
from msbp_jax.weights import Pattern


class Dense(NamedTuple):
    """Dense convolutions with a kernel that is made each time.

    Attributes:
      weight: How it is made of entries, and entries are taken of its gradient.
    """

    weight: dense.Dense

    def times(
        self,
        x: Float[Array, "images *pixels channels"],
        values: Float[Array, " entries"],
        pattern: Pattern,
        geometry: Geometry,
        precision: Any,
    ) -> Float[Array, "images *positions features"]:
        """See `msbp_jax.kernels.convolutions.times`; in the dtype of its sums."""
        w = self._kernel(values, pattern)
        return _convolution(x, w, geometry, precision, accumulation_dtype(x.dtype, w.dtype))

    def input_gradient(
        self,
        g: Float[Array, "images *positions features"],
        values: Float[Array, " entries"],
        pattern: Pattern,
        geometry: Geometry,
        shape: Shape,
        precision: Any,
    ) -> Float[Array, "images *pixels channels"]:
        """See `msbp_jax.kernels.convolutions.input_gradient`; in the dtype of `g`."""
        w = self._kernel(values, pattern).astype(g.dtype)
        return _pulled_back(lambda x: _convolution(x, w, geometry, precision, None), shape, w, g)

    def weight_gradient(
        self,
        x: Float[Array, "images *pixels channels"],
        g: Float[Array, "images *positions features"],
        pattern: Pattern,
        geometry: Geometry,
        precision: Any,
    ) -> Float[Array, " entries"]:
        """See `msbp_jax.kernels.convolutions.weight_gradient`; in the dtype of `g`, as that of the images is."""
        x = x.astype(g.dtype)
        whole = _pulled_back(lambda w: _convolution(x, w, geometry, precision, None), pattern.shape, x, g)
        return self.weight.take(whole.reshape(pattern.matrix_shape), pattern)

    def _kernel(self, values: jax.Array, pattern: Pattern) -> jax.Array:
        return self.weight.make(values, pattern).reshape(pattern.shape)


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
