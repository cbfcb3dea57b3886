"""A convolution with a sparse kernel, as an operation of a rule and by itself: dx and dw at the entries alone.

Its operands are those of the convolution, with the values in place of the kernel, and then the pattern.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.kernels import convolutions
from msbp_jax.kernels.convolutions import Geometry
from msbp_jax.rules._convolution import Convolution, features_last, inverse
from msbp_jax.rules._operation import AsMatrices, Dims, Examples, Matrices, Operands, Shape
from msbp_jax.weights import Pattern, SparseWeight


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparseConvolution:
    """A convolution of images and a sparse kernel `[*window, channels, features]`.

    Attributes:
      dense: The same with a dense kernel.
      shape: Of the dense kernel.
      structure: Of the pattern, whose arrays are the operands from the third on.
      backend: "native" or "xla"; None to choose, which may be "unpacked".
    """

    dense: Convolution
    shape: Shape
    structure: Any
    backend: str | None = None

    def forward(self, *operands: jax.Array) -> jax.Array:
        """Return the convolution itself, on a mesh of explicit axes placed as that with a dense kernel is."""
        return _compat.with_automatic_sharding(self._forward, operands, self._out(*operands[:2]))

    def _forward(self, *operands: jax.Array) -> jax.Array:
        x, values, *arrays = operands
        dtype = self.dense.preferred_element_type or x.dtype
        images = jnp.transpose(x, features_last(self.dense.dimension_numbers.lhs_spec))
        # Within shard_map a rule may not return a gradient that varies over devices for an operand that does not.
        (images, values, *arrays), _, _ = _compat.varying_alike([images, values, *arrays])
        pattern = jax.tree.unflatten(self.structure, arrays)
        y = _product(self.geometry, self.dense.precision, self.backend, images, values, pattern)
        return jnp.transpose(y.astype(dtype), inverse(features_last(self.dense.dimension_numbers.out_spec)))

    @property
    def geometry(self) -> Geometry:
        """Of the window, for images with their channels last."""
        return Geometry(
            window=tuple(int(size) for size in self.shape[:-2]),
            strides=self.dense.window_strides,
            padding=self.dense.padding,
            dilation=self.dense.rhs_dilation,
            groups=self.dense.feature_group_count,
        )

    def backend_for(self, pattern: Pattern, x: Shape, rows: Any, *dtypes: Any) -> str:
        """Return what runs it for images of a shape as the program has them."""
        del rows
        images = tuple(x[axis] for axis in features_last(self.dense.dimension_numbers.lhs_spec))
        return self.backend or convolutions.chosen(pattern, self.geometry, images, *dtypes)

    def break_even(self, pattern: Pattern, rows: int) -> float:
        """Return the share of the entries up to which it is faster than with a dense kernel."""
        del rows
        return convolutions.break_even(pattern)

    def dims(self, lhs: Shape, rhs: Shape, out: Shape) -> Dims:
        """Return the canonical sizes."""
        del rhs
        return self.dense.dims(lhs, self.shape, out)

    def canonical_g(self, g: jax.Array, operands: Operands) -> Float[Array, "batch rows n"]:
        """Return the gradient of the output as `[1, images * positions, n]`."""
        return self.dense.canonical_g(g, operands)

    def program_g(self, g: Float[Array, "batch rows n"], operands: Operands, out: Shape) -> jax.Array:
        """Return a canonical gradient in the shape that the program has."""
        return self.dense.program_g(g, operands, out)

    def matrices_by(self, lhs: Shape, rhs: Shape, backend: str | None) -> Matrices:
        """Return that its kernel is a list of entries."""
        del lhs, rhs, backend
        return Matrices.BY_ENTRIES

    def as_matrices(self, operands: Operands, out: Shape) -> AsMatrices:
        """Return its windows and a dense kernel, of which norms are taken."""
        x, values, *arrays = operands
        kernel = SparseWeight(values, jax.tree.unflatten(self.structure, arrays)).dense()
        return self.dense.as_matrices((x, kernel), out)

    def examples(self, lhs: Shape, rhs: Shape, dtype: Any, backend: str | None) -> Examples | None:
        """Return None: its products are those of the entries."""
        del lhs, rhs, dtype, backend
        return None

    @property
    def narrows(self) -> bool:
        """False: its pattern is of all features."""
        return False

    @property
    def feature_axis(self) -> int:
        """Never asked."""
        raise NotImplementedError

    def _out(self, x: jax.Array, values: jax.Array) -> jax.ShapeDtypeStruct:
        kernel = jax.ShapeDtypeStruct(self.shape, _compat.placed_like(values).dtype)
        found: jax.ShapeDtypeStruct = jax.eval_shape(self.dense.forward, _compat.placed_like(x), kernel)
        return found


def sparse_convolution_of(dense: Convolution, weight: SparseWeight) -> SparseConvolution | str:
    """Return a convolution with a sparse kernel; of one that there is no kernel for, the reason.

    Args:
      dense: The convolution with the dense kernel.
      weight: The kernel.
    """
    axes = weight.ndim
    by_place = (axes - 1, axes - 2, *range(axes - 2))
    reasons = {
        "the kernel is one of several that are stacked": weight.values.ndim != 1,
        "the kernel has another order of axes than [*window, channels, features]": (
            weight.turned or dense.dimension_numbers.rhs_spec != by_place
        ),
        f"input_axes= of prune must say that all axes but the last are inputs, {axes - 1} here": (
            weight.pattern.input_axes != axes - 1
        ),
        "images have more than two axes of pixels": not 3 <= axes <= 4,
        "groups of images": dense.batch_group_count != 1,
        "a transposed convolution": any(step != 1 for step in dense.lhs_dilation),
        "tiles are of matrix products": weight.backend == "tiles",
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), ""):
        return reason
    return SparseConvolution(
        dense=dense, shape=weight.shape, structure=jax.tree.structure(weight.pattern), backend=weight.backend
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    geometry: Geometry, precision: Any, backend: str | None, x: jax.Array, values: jax.Array, pattern: Pattern
) -> jax.Array:
    return convolutions.times(x, values, pattern, geometry, precision=precision, backend=backend)


def _forward(
    geometry: Geometry, precision: Any, backend: str | None, x: jax.Array, values: jax.Array, pattern: Pattern
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Pattern]]:
    return _product(geometry, precision, backend, x, values, pattern), (x, values, pattern)


def _backward(
    geometry: Geometry,
    precision: Any,
    backend: str | None,
    residuals: tuple[jax.Array, jax.Array, Pattern],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    x, values, pattern = residuals
    options: dict[str, Any] = {"precision": precision, "backend": backend}
    dx = convolutions.input_gradient(g, values, pattern, geometry, x.shape, **options)
    dw = convolutions.weight_gradient(x, g, pattern, geometry, **options)
    return dx.astype(x.dtype), dw.astype(values.dtype), None


_product.defvjp(_forward, _backward)
