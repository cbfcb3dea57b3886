"""What a sparsifier may know of a site before anything runs, and what it says to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from msbp_jax.formats import Size


class Where(NamedTuple):
    """A site, as far as its shapes tell.

    Attributes:
      rows: Rows of the gradient of the output.
      n: Its features.
      m: Entries of the input that make one entry of the output.
      dtype: Of the gradient.
      rows_per_example: Rows that each entry of the output's leading axis has.
      on_devices: Whether it stands inside a `shard_map`, so that rows are those of one device.
      min_features: Fewer features than these make a choice among them not worth while; 0 where the plan names the
        site itself, and so decides.
      backend: Which backend `sparse_vjp` was asked for; None to choose.
      native_examples: Whether native kernels have the backward of all of a convolution's images.
    """

    rows: Size
    n: int
    m: int
    dtype: DTypeLike
    rows_per_example: Size = 1
    on_devices: bool = False
    min_features: int = 0
    backend: str | None = None
    native_examples: bool = False

    @property
    def cotangent(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what a sparsifier is applied to."""
        return jax.ShapeDtypeStruct((self.rows, self.n), self.dtype)

    @property
    def maker(self) -> str | None:
        """The backend that makes a compact cotangent here: native code where there is some, unless XLA is asked for."""
        return "xla" if self.backend == "xla" else None

    @property
    def too_narrow(self) -> str:
        """Why a choice of features is not worth while here, "" if it may be."""
        return f"{self.n} features, fewer than min_features={self.min_features}" if self.n < self.min_features else ""


class Stays(NamedTuple):
    """A sparsifier's answer that a site stays dense.

    Attributes:
      reason: Why, in words for the report.
      by_choice: Whether that is what the plan asks for (all features kept), so that nobody need be told.
    """

    reason: str
    by_choice: bool = False


def keeps_all(name: str, n: int) -> Stays:
    """Return the answer of a sparsifier that would keep every feature."""
    return Stays(f"{name} keeps all {n} features", by_choice=True)


def abstract_norms(wants: Sequence[str], cotangent: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what a sparsifier wants to see besides the cotangent, by name.

    Raises:
      ValueError: There is nothing of that name.
    """
    rows, n = cotangent.shape
    shapes = {"input_norms": (rows,), "weight_norms": (n,)}
    if unknown := sorted(set(wants) - set(shapes)):
        raise ValueError(f"A sparsifier may want {' and '.join(shapes)}, got {', '.join(map(repr, unknown))}.")
    return {name: jax.ShapeDtypeStruct(shapes[name], jnp.float32) for name in wants}
