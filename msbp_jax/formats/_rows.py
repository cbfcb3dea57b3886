"""`Rows`: a few whole rows of the cotangent, as many as there happen to be."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from msbp_jax.formats._format import Format
from msbp_jax.formats._groups import Size, accumulation_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(Format):
    """A few whole rows of a cotangent: `p[i] = weight[i] values[i]`, and 0 where the weight is 0.

    The matrix is not copied: products gather the rows that are kept, whose number is known when the program runs.

    Attributes:
      values: The matrix that the rows stand in, `[rows, n]`, in the dtype of the cotangent.
      weight: What each row counts, `[rows]`, float32; 0 for a row that is left out.
      unchanged: True where every weight is 0 or 1, and rows of weight 0 are exactly 0 in `values` too: then `p` is
        `values` itself.
      share: Share of the rows that is kept, where that is known beforehand; None where it is not.
      drawn_together: Consecutive rows that were kept or left out together; None where nothing was drawn here, as of
        rows of zeros, which may be those of whole examples.
    """

    values: jax.Array
    weight: jax.Array
    unchanged: bool = dataclasses.field(default=False, metadata={"static": True})
    share: float | None = dataclasses.field(default=None, metadata={"static": True})
    drawn_together: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[Size, int]:
        """`(rows, n)` of the cotangent that is represented."""
        rows, n = self.values.shape
        return rows, n

    def kept_rows(self) -> Bool[Array, " rows"]:
        """Return a mask, True where a row is kept."""
        return self.weight != 0

    def materialize(self) -> Float[Array, "rows n"]:
        """Return the matrix with zeros in the rows that are left out."""
        if self.unchanged:
            return self.values
        return weighed(self.values, self.weight)

    def astype(self, dtype: jax.typing.DTypeLike) -> Rows:
        """Return the same rows with values of another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def joined(self, shape: tuple[Size, int]) -> Rows:
        """Return the rows of all blocks."""
        return dataclasses.replace(self, values=self.values.reshape(shape), weight=self.weight.reshape(shape[0]))

    @property
    def has_products(self) -> bool:
        """True: `msbp_jax.kernels` has them."""
        return True

    @property
    def pays_on_patches(self) -> bool:
        """False: rows of patches are not measured."""
        return False

    @property
    def skips(self) -> str:
        """Rows."""
        return "rows"

    def kept_share(self) -> float | None:
        """Return the share of the rows, where it is known beforehand."""
        return self.share

    def share_when_run(self) -> Float[Array, ""]:
        """Return the share of the rows that is kept."""
        return jnp.mean(self.kept_rows(), dtype=jnp.float32)

    def describe(self) -> str:
        """Say which rows are kept."""
        if self.share is not None:
            return f"{self.share:.3g} of the rows"
        return "rows that are not 0" if self.unchanged else "rows"

    def faults(self, u: jax.Array, *, exact: bool) -> list[str]:
        """Say what is wrong with it as what was kept of `u`."""
        found = {
            f"its values are {self.values.dtype}, expected {u.dtype}": self.values.dtype != u.dtype,
            f"its weights are {self.weight.dtype}, expected float32": self.weight.dtype != jnp.float32,
            f"there are {self.weight.shape} weights, expected one for each row": self.weight.shape != u.shape[:1],
        }
        faults = [fault for fault, is_so in found.items() if is_so]
        if not faults and exact and self.unchanged:
            masked = jnp.where(self.kept_rows()[:, None], u, jnp.zeros((), u.dtype))
            same = jnp.array_equal(self.materialize(), masked, equal_nan=True)
            faults += [] if same else ["rows are marked unchanged, but differ from the gradient's"]
        return faults


def weighed(values: Float[Array, "rows n"], weight: Float[Array, " rows"]) -> Float[Array, "rows n"]:
    """Return rows times their weights, rounded once; 0 where the weight is 0, whatever stands there."""
    dtype = accumulation_dtype(values.dtype)
    scaled = (values.astype(dtype) * weight[:, None].astype(dtype)).astype(values.dtype)
    return jnp.where(weight[:, None] != 0, scaled, jnp.zeros((), scaled.dtype))
