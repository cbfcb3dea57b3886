"""`lax.ragged_dot` as an operation of a rule: each run of rows has an expert's matrix of its own.

One choice for the whole batch makes both products ragged products with fewer output features; of rows that are left
out, both are ragged products of the others. Other groups run whole, on the sparse gradient: their rows may belong to
several experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from msbp_jax import _compat
from msbp_jax.rules._operation import AsMatrices, Dims, Examples, Matrices, Operands, Shape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RaggedDot:
    """`y[i] = x[i] w[expert of row i]`, x being `[rows, m]`, w `[experts, m, n]`, and the experts' numbers of rows.

    Attributes:
      precision: As in `lax.ragged_dot`.
      preferred_element_type: As in `lax.ragged_dot`.
      group_offset: As in `lax.ragged_dot`.
    """

    precision: Any = None
    preferred_element_type: Any = None
    group_offset: Any = None

    def forward(self, *operands: jax.Array) -> jax.Array:
        """Return the contraction itself."""
        x, w, sizes = operands
        return lax.ragged_dot(
            x,
            w,
            sizes,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            group_offset=self.group_offset,
        )

    def dims(self, lhs: Shape, rhs: Shape, out: Shape) -> Dims:
        """Return the canonical sizes."""
        del rhs
        return Dims((), out[0], out[0], lhs[1], out[1])

    def canonical_g(self, g: jax.Array, operands: Operands) -> Float[Array, "batch rows n"]:
        """Return the gradient of the output as `[1, rows, n]`."""
        del operands
        return g[None]

    def program_g(self, g: Float[Array, "batch rows n"], operands: Operands, out: Shape) -> jax.Array:
        """Return a canonical gradient in the shape that the program has."""
        del operands, out
        return g[0]

    def matrices_by(self, lhs: Shape, rhs: Shape, backend: str | None) -> Matrices:
        """Return that it is none: rows that share a choice may belong to several experts."""
        del lhs, rhs, backend
        return Matrices.NOT

    def as_matrices(self, operands: Operands, out: Shape) -> AsMatrices:
        """Never asked."""
        raise NotImplementedError

    def examples(self, lhs: Shape, rhs: Shape, dtype: Any, backend: str | None) -> Examples | None:
        """Return how rows are left out, unless experts are numbered from an offset."""
        del rhs, dtype
        if backend == "dense" or self.group_offset is not None or _compat.is_symbolic(*lhs):
            return None
        # Which rows are an expert's is counted over all of them.
        return Examples("xla", 0, ("I m", "E m n", "I n"), _recounted)

    @property
    def narrows(self) -> bool:
        """True: fewer features make a smaller ragged product."""
        return True

    @property
    def feature_axis(self) -> int:
        """The last one."""
        return 2


def _recounted(rest: Operands, kept: Bool[Array, " rows"]) -> Operands:
    """Return how many rows that are kept each expert has; those that follow them are no expert's."""
    (sizes,) = rest
    before = jnp.concatenate([jnp.zeros((1,), sizes.dtype), jnp.cumsum(kept, dtype=sizes.dtype)])
    ends = jnp.minimum(jnp.cumsum(sizes), kept.shape[0])
    return (jnp.diff(before[ends], prepend=jnp.zeros((1,), sizes.dtype)),)
