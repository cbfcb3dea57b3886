"""Convolutions with a sparse kernel, channels last: `y = x * w`, dx, and dw at the entries of the pattern.

| backend | |
|---|---|
| native | lists of entries, on a CPU, nothing unfolded: only they are multiplied |
| unpacked | the dense kernel, made of the entries by native code; dw is a dense one of which they are taken |
| xla | the same, made by XLA |

The pattern is that of the kernel `[*window, channels / groups, features]`, all axes but the last being inputs.
"""

from __future__ import annotations

from typing import Any, Final

import jax
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.kernels.convolutions import native
from msbp_jax.kernels.convolutions.dense import Dense
from msbp_jax.kernels.convolutions.geometry import Geometry as Geometry
from msbp_jax.kernels.convolutions.geometry import Shape
from msbp_jax.kernels.native import calls
from msbp_jax.kernels.weights import dense
from msbp_jax.weights import Pattern

_BACKENDS: Final[dict[str, Any]] = {"native": native, "unpacked": Dense(dense.UNPACKED), "xla": Dense(dense.XLA)}

# Up to which share of the entries lists are faster than a dense kernel, the better of XLA's two ways to dw, by how many
# inputs an output has at most (`python -m benchmarks "sparse conv"`): XLA is best where these are many.
_BREAK_EVEN: Final = ((640, 0.5), (float("inf"), 0.3))


def times(
    x: Float[Array, "images *pixels channels"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    *,
    precision: Any = None,
    backend: str | None = None,
) -> Float[Array, "images *positions features"]:
    """Return the convolution, float32 or of the dtype of `x`.

    Args:
      x: Images.
      values: Of the kernel's entries.
      pattern: Where they stand; of one layer.
      geometry: Of the window.
      precision: As in `lax.conv_general_dilated`; native sums are float32 throughout.
      backend: "native" or "xla"; None to choose.

    Raises:
      NotImplementedError: The backend that is named cannot.
    """
    run = _chosen(backend, pattern, geometry, x.shape, x, values)
    return run.times(x, values, pattern, geometry, precision)


def input_gradient(
    g: Float[Array, "images *positions features"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    geometry: Geometry,
    shape: Shape,
    *,
    precision: Any = None,
    backend: str | None = None,
) -> Float[Array, "images *pixels channels"]:
    """Return the gradient of the images, float32 or of the dtype of the values.

    Args:
      g: Gradient of the result.
      values: Of the kernel's entries.
      pattern: Where they stand; of one layer.
      geometry: Of the window.
      shape: Of the images.
      precision: As in `lax.conv_general_dilated`; native sums are float32 throughout.
      backend: "native" or "xla"; None to choose.

    Raises:
      NotImplementedError: The backend that is named cannot.
    """
    run = _chosen(backend, pattern, geometry, shape, g, values)
    return run.input_gradient(g, values, pattern, geometry, shape, precision)


def weight_gradient(
    x: Float[Array, "images *pixels channels"],
    g: Float[Array, "images *positions features"],
    pattern: Pattern,
    geometry: Geometry,
    *,
    precision: Any = None,
    backend: str | None = None,
) -> Float[Array, " entries"]:
    """Return the gradient of the kernel's entries, 0 for padding, float32 or of the dtype of `x`.

    Args:
      x: Images.
      g: Gradient of the result.
      pattern: Which entries; of one layer.
      geometry: Of the window.
      precision: As in `lax.conv_general_dilated`; native sums are float32 throughout.
      backend: "native" or "xla"; None to choose.

    Raises:
      NotImplementedError: The backend that is named cannot.
    """
    run = _chosen(backend, pattern, geometry, x.shape, x, g)
    return run.weight_gradient(x, g, pattern, geometry, precision)


def break_even(pattern: Pattern) -> float:
    """Return the share of the entries up to which a sparse kernel is faster than a dense one."""
    inputs, _ = pattern.matrix_shape
    return next(share for most, share in _BREAK_EVEN if inputs <= most)


def chosen(pattern: Pattern, geometry: Geometry, shape: Shape, *dtypes: Any) -> str:
    """Return the backend that runs a convolution of images of this shape with operands of these dtypes here."""
    if _nothing(geometry, shape):
        return "xla"
    if not calls.runs(*dtypes):
        return "xla"
    try:
        native.check_size(geometry, shape, pattern.shape[-1])
    except NotImplementedError:
        return "unpacked"
    return "native" if pattern.density <= break_even(pattern) else "unpacked"


def _nothing(geometry: Geometry, shape: Shape) -> bool:
    """Whether there is no work, or nobody knows yet how much."""
    return _compat.is_symbolic(*shape) or 0 in shape or 0 in geometry.positions(shape[1:-1])


def _chosen(
    backend: str | None, pattern: Pattern, geometry: Geometry, shape: Shape, first: jax.Array, second: jax.Array
) -> Any:
    if _nothing(geometry, shape):
        return _BACKENDS["xla"]
    if backend == "native":
        calls.check(first, second)
        native.check_size(geometry, shape, pattern.shape[-1])
    if backend == "tiles":
        raise NotImplementedError('backend="tiles" multiplies matrices: convolutions are "native" or "xla"')
    return _BACKENDS[backend or chosen(pattern, geometry, shape, first.dtype, second.dtype)]
