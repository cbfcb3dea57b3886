"""`Dense`: a cotangent with every entry in place."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float

from msbp_jax.formats._format import Format
from msbp_jax.formats._groups import Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Format):
    """A cotangent with every entry in place: `p = values`.

    Attributes:
      values: `[rows, n]`, in the dtype of the cotangent.
      native: Whether products are those of native kernels, where these have a contraction.
    """

    values: jax.Array
    native: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[Size, int]:
        """`(rows, n)`."""
        rows, n = self.values.shape
        return rows, n

    def materialize(self) -> Float[Array, "rows n"]:
        """Return the matrix itself."""
        return self.values

    def astype(self, dtype: jax.typing.DTypeLike) -> Dense:
        """Return the same entries in another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def describe(self) -> str:
        """Return that nothing is left out."""
        return "all"

    def kept_share(self) -> float:
        """Return 1."""
        return 1.0

    def faults(self, u: jax.Array, *, exact: bool) -> list[str]:
        """Say what is wrong with it as what was kept of `u`."""
        del exact
        wrong = self.values.dtype != u.dtype
        return [f"its values are {self.values.dtype}, expected {u.dtype}"] if wrong else []
