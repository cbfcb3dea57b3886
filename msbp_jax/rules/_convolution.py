"""`lax.conv_general_dilated` as an operation of a rule: rows are the positions of all images, n the output channels.

One choice for the whole batch makes both products convolutions with fewer output channels; of images that are left out,
both are those of the others. Other groups go through the
kernels, on the patches of the input, where that is faster; else the convolution runs whole, on the sparse gradient, as
grouped convolutions (depthwise among them) always do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from msbp_jax import _compat, kernels
from msbp_jax.kernels import images as of_images
from msbp_jax.kernels.convolutions.geometry import Geometry
from msbp_jax.rules._operation import AsMatrices, Dims, Examples, Matrices, Operands, Shape
from msbp_jax.rules._patches import Window


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """A convolution whose kernel, the right operand, is the weight; all attributes as in `lax.conv_general_dilated`."""

    window_strides: Shape
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Shape
    rhs_dilation: Shape
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int = 1
    batch_group_count: int = 1
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None

    def forward(self, *operands: jax.Array) -> jax.Array:
        """Return the convolution itself."""
        parameters: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        x, w = operands
        return lax.conv_general_dilated(x, w, **parameters)

    def dims(self, lhs: Shape, rhs: Shape, out: Shape) -> Dims:
        """Return the canonical sizes: rows are images times positions, m is what one output is made from."""
        del lhs
        batch, feature, *_ = self.dimension_numbers.out_spec
        n = out[feature]
        m = math.prod(rhs) // max(1, rhs[self.dimension_numbers.rhs_spec[0]])
        return Dims((), math.prod(out) // max(1, n), out[batch], m, n)

    def canonical_g(self, g: jax.Array, operands: Operands) -> Float[Array, "batch rows n"]:
        """Return the gradient of the output as `[1, images * positions, n]`."""
        del operands
        last = jnp.transpose(g, features_last(self.dimension_numbers.out_spec))
        return last.reshape(1, -1, last.shape[-1])

    def program_g(self, g: Float[Array, "batch rows n"], operands: Operands, out: Shape) -> jax.Array:
        """Return a canonical gradient, of any number of features, in the order of axes that the program has."""
        del operands
        order = features_last(self.dimension_numbers.out_spec)
        shape = [out[axis] for axis in order[:-1]]
        return jnp.transpose(g.reshape(*shape, g.shape[-1]), inverse(order))

    @property
    def is_grouped(self) -> bool:
        """Whether it is several convolutions of some of the features, or of some of the images, each."""
        return self.feature_group_count > 1 or self.batch_group_count > 1

    def matrices_by(self, lhs: Shape, rhs: Shape, backend: str | None) -> Matrices:
        """Return "by patches" where the kernels are asked for by name, or patches are measured to be faster."""
        del lhs
        if self.is_grouped:
            return Matrices.NOT
        features_out, features_in, *spatial = self.dimension_numbers.rhs_spec
        window, stride = math.prod(rhs[axis] for axis in spatial), math.prod(self.window_strides)
        pay = kernels.patches_pay(rhs[features_in], rhs[features_out], window, stride)
        return Matrices.BY_PATCHES if backend is not None or pay else Matrices.NOT

    def examples(self, lhs: Shape, rhs: Shape, dtype: Any, backend: str | None) -> Examples | None:
        """Return how images are left out: natively on a CPU, whose convolutions in a branch of XLA's are too slow."""
        axis = self.dimension_numbers.lhs_spec[0]
        if self.batch_group_count > 1 or backend == "dense" or _compat.is_symbolic(lhs[axis]):
            return None
        if backend in (None, "native") and self._runs_natively(lhs, rhs, dtype):
            return Examples("native", axis, self._axes, products=self._native_products)
        on_cpu = "cpu" in kernels.platform_names()
        return None if on_cpu and backend != "xla" else Examples("xla", axis, self._axes)

    @property
    def _axes(self) -> tuple[str, str, str]:
        """The axes of images, kernel and result in their order: images i, channels m, features n."""
        lhs, rhs, out = self.dimension_numbers
        m, n = ("m", "n") if self.feature_group_count == 1 else ("M", "N")
        placed = lambda spec, first, second, others: " ".join(
            letter for _, letter in sorted(zip(spec, (first, second, *others), strict=False))
        )
        return (
            placed(lhs, "i", m, "ABCDE"),
            placed(rhs, n, "G" if m == "M" else m, "FHJKL"),
            placed(out, "i", n, "OPQRS"),
        )

    def _native_products(
        self, operands: Operands, g: jax.Array, kept: Float[Array, " images"]
    ) -> tuple[jax.Array, jax.Array]:
        """Return the gradients of images and kernel, float32 sums; images that are left out are not computed."""
        x, w = operands
        x_order, w_order = features_last(self.dimension_numbers.lhs_spec), _kernel_order(self.dimension_numbers)
        geometry = self._geometry(w.shape)
        # Operands may be narrower than the gradient, by `preferred_element_type`.
        images, kernel = jnp.transpose(of_images.taken(x), x_order), jnp.transpose(of_images.taken(w), w_order)
        g = jnp.transpose(g, features_last(self.dimension_numbers.out_spec))
        dx = of_images.grad_input(g, kept, kernel, geometry, images.shape[1:-1])
        dw = of_images.grad_weight(g, kept, images, geometry)
        dx, dw = jnp.transpose(dx, inverse(x_order)), jnp.transpose(dw, inverse(w_order))
        return dx.astype(x.dtype), dw.astype(w.dtype)

    def _runs_natively(self, lhs: Shape, rhs: Shape, dtype: Any) -> bool:
        if any(step != 1 for step in self.lhs_dilation):
            return False
        images = tuple(lhs[axis] for axis in features_last(self.dimension_numbers.lhs_spec))
        features = int(rhs[self.dimension_numbers.rhs_spec[0]])
        return of_images.runs(self._geometry(rhs), images, features, dtype)

    def _geometry(self, rhs: Shape) -> Geometry:
        return Geometry(
            window=tuple(int(rhs[axis]) for axis in self.dimension_numbers.rhs_spec[2:]),
            strides=self.window_strides,
            padding=self.padding,
            dilation=self.rhs_dilation,
            groups=self.feature_group_count,
        )

    def as_matrices(self, operands: Operands, out: Shape) -> AsMatrices:
        """Return the windows of the input laid out as rows, and the kernel as a matrix."""
        x, w = operands
        x_order = features_last(self.dimension_numbers.lhs_spec)
        features_out, _, *spatial = self.dimension_numbers.rhs_spec
        w_order = _kernel_order(self.dimension_numbers)
        window = Window(
            size=tuple(w.shape[axis] for axis in spatial),
            strides=self.window_strides,
            padding=self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            positions=tuple(out[axis] for axis in self.dimension_numbers.out_spec[2:]),
        )
        patches, pull_back = jax.vjp(lambda x: window.patches(jnp.transpose(x, x_order)), x)
        matrix = jnp.transpose(w, w_order).reshape(-1, w.shape[features_out])

        def give_back(dx: jax.Array, dw: jax.Array) -> tuple[jax.Array, jax.Array]:
            dw = dw[0].reshape([w.shape[axis] for axis in w_order])
            return pull_back(dx[0])[0], jnp.transpose(dw, inverse(w_order))

        return AsMatrices(patches[None], matrix[None], 1, self.precision, give_back)

    @property
    def narrows(self) -> bool:
        """Whether fewer output channels make a smaller convolution: if it is not grouped."""
        return not self.is_grouped

    @property
    def feature_axis(self) -> int:
        """The kernel's axis of output channels."""
        return int(self.dimension_numbers.rhs_spec[0])


def features_last(spec: Sequence[int]) -> Shape:
    """Return the permutation to (batch, positions, features) for a spec of (batch, features, positions)."""
    batch, features, *spatial = spec
    return (batch, *spatial, features)


def _kernel_order(numbers: lax.ConvDimensionNumbers) -> Shape:
    """Return the permutation of a kernel's axes to (window, channels, features)."""
    features_out, features_in, *spatial = numbers.rhs_spec
    return (*spatial, features_in, features_out)


def inverse(order: Shape) -> Shape:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
