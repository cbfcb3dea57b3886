"""`Split`: one cotangent for the gradient of the inputs, and another for that of the weight."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float

from msbp_jax.formats._format import Format
from msbp_jax.formats._groups import Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split(Format):
    """Two cotangents of one shape: `dx = p_dx wᵀ`, `dw = xᵀ p_dw`.

    What is asked of one cotangent is answered for the one that the weight sees: what it lacks is what a memory keeps.

    Attributes:
      dx: What the gradient of the inputs is made from.
      dw: What the gradient of the weight is made from.
    """

    dx: Format
    dw: Format

    @property
    def shape(self) -> tuple[Size, int]:
        """`(rows, n)`, of both."""
        return self.dw.shape

    @property
    def parts(self) -> tuple[Format, Format]:
        """Both."""
        return self.dx, self.dw

    def materialize(self) -> Float[Array, "rows n"]:
        """Return the matrix that the weight sees."""
        return self.dw.materialize()

    def astype(self, dtype: jax.typing.DTypeLike) -> Split:
        """Return both with values of another dtype."""
        return Split(self.dx.astype(dtype), self.dw.astype(dtype))

    def left_of(self, u: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
        """Return `u - p_dw`."""
        return self.dw.left_of(u)

    def sum_left_of(self, u: Float[Array, "rows n"], live: Bool[Array, "rows 1"]) -> Float[Array, " n"]:
        """Return the sum of `u - p_dw` over the rows that take part."""
        return self.dw.sum_left_of(u, live)

    def entries(self) -> Float[Array, ""]:
        """Return the mean of how many entries the two propagate."""
        return (self.dx.entries() + self.dw.entries()) / 2

    def joined(self, shape: tuple[Size, int]) -> Split | None:
        """Return both of all blocks, where both can be joined."""
        dx, dw = self.dx.joined(shape), self.dw.joined(shape)
        return None if dx is None or dw is None else Split(dx, dw)

    def kept_share(self) -> float | None:
        """Return the mean of the two shares, as both products are of one size."""
        dx, dw = self.dx.kept_share(), self.dw.kept_share()
        return None if dx is None or dw is None else (dx + dw) / 2

    def describe(self) -> str:
        """Return what both keep."""
        return f"dx {self.dx.describe()}, dw {self.dw.describe()}"

    def faults(self, u: jax.Array, *, exact: bool) -> list[str]:
        """Say what is wrong with either."""
        found = {"dx": self.dx, "dw": self.dw}
        wrong = [
            f"{name} represents shape {p.shape}, expected {u.shape}" for name, p in found.items() if p.shape != u.shape
        ]
        return wrong + [f"{name}: {fault}" for name, p in found.items() for fault in p.faults(u, exact=exact)]
