"""`Entries`: any of a cotangent's entries, as many in a row as there happen to be."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.formats._format import Format
from msbp_jax.formats._groups import Size, accumulation_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries(Format):
    """A cotangent most of whose entries are 0: `p = scale values`.

    It is passed on as a matrix, so that no number of entries is too large; products list those that are not 0.

    Attributes:
      values: `[rows, n]`: entries in the dtype of the cotangent or, with `bits`, whole levels in int8.
      scale: What 1 is worth, float32, `[]`; None for 1. Levels that are small whole numbers are exact in any dtype, and
        their multiples are not.
      share: Share of the entries that are not 0, float32, `[]`, where only the run tells; None where `density` does.
      density: That share, where it is known beforehand.
      bits: None; 8 or 4 for products in 8 bits, with the other operand quantised.
      dtype: Of the cotangent, where that is not the dtype of `values`.
    """

    values: jax.Array
    scale: jax.Array | None = None
    share: jax.Array | None = None
    density: float | None = dataclasses.field(default=None, metadata={"static": True})
    bits: int | None = dataclasses.field(default=None, metadata={"static": True})
    dtype: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[Size, int]:
        """`(rows, n)` of the cotangent that is represented."""
        rows, n = self.values.shape
        return rows, n

    def scale_or_one(self) -> Float[Array, ""]:
        """Return what 1 is worth."""
        return jnp.ones((), jnp.float32) if self.scale is None else self.scale

    def materialize(self) -> Float[Array, "rows n"]:
        """Return the matrix, each entry rounded once."""
        dtype = self.values.dtype if self.dtype is None else jnp.dtype(self.dtype)
        if self.scale is None:
            return self.values.astype(dtype)
        wide = accumulation_dtype(dtype)
        return (self.values.astype(wide) * self.scale.astype(wide)).astype(dtype)

    def factored(self) -> tuple[Float[Array, "rows n"], Float[Array, ""] | None]:
        """Return the levels, and what 1 is worth."""
        dtype = self.values.dtype if self.dtype is None else jnp.dtype(self.dtype)
        return self.values.astype(dtype), self.scale

    def astype(self, dtype: jax.typing.DTypeLike) -> Entries:
        """Return the same cotangent in another dtype; whole levels stay as they are."""
        if self.bits is not None:
            return dataclasses.replace(self, dtype=jnp.dtype(dtype))
        return dataclasses.replace(self, values=self.values.astype(dtype), dtype=None)

    def entries(self) -> Float[Array, ""]:
        """Return how many entries are not 0."""
        return jnp.sum(self.values != 0, dtype=jnp.float32)

    def joined(self, shape: tuple[Size, int]) -> Entries | None:
        """Return the entries of all blocks, if they have no scales of their own."""
        if self.scale is not None:
            return None
        share = None if self.share is None else jnp.mean(self.share)
        return dataclasses.replace(self, values=self.values.reshape(shape), share=share)

    @property
    def has_products(self) -> bool:
        """True: `msbp_jax.kernels` has them."""
        return True

    @property
    def pays_on_patches(self) -> bool:
        """False: entries of patches are not measured."""
        return False

    @property
    def skips(self) -> str:
        """Entries."""
        return "entries"

    def kept_share(self) -> float | None:
        """Return the share of the entries, where it is known beforehand; 1 in 8 bits, where nothing is left out."""
        return self.density if self.bits is None else 1.0

    def share_when_run(self) -> Float[Array, ""] | None:
        """Return the share of the entries, where only the run tells."""
        return self.share if self.bits is None else None

    def describe(self) -> str:
        """Say which entries are kept."""
        said = "entries that are not 0" if self.density is None else f"{self.density:.3g} of the entries"
        return said if self.bits is None else f"{said}, {self.bits} bits"

    def faults(self, u: jax.Array, *, exact: bool) -> list[str]:
        """Say what is wrong with it as what was kept of `u`."""
        del exact
        found = {
            f"it is of dtype {self.materialize().dtype}, expected {u.dtype}": self.materialize().dtype != u.dtype,
            f"its levels are {self.values.dtype}, expected int8": self.bits is not None
            and self.values.dtype != jnp.int8,
        }
        return [fault for fault, is_so in found.items() if is_so]
