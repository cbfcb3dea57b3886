"""The sizes of a layer's backward, on which its cost depends."""

from __future__ import annotations

from typing import NamedTuple

from msbp_jax.formats import Columns, Size


class Layer(NamedTuple):
    """Sizes of a layer and of the choice in its backward.

    Attributes:
      rows: Rows of the gradient.
      m: Input features.
      n: Output features.
      k: Features kept.
      rows_per_group: Rows that share a choice.
    """

    rows: Size
    m: int
    n: int
    k: int
    rows_per_group: Size

    @property
    def groups(self) -> Size:
        """How many choices are made."""
        return -(-self.rows // self.rows_per_group)


def layer_of(cotangent: Columns, m: int) -> Layer:
    """Return the sizes for a compact cotangent and `m` input features."""
    rows, n = cotangent.shape
    return Layer(rows, m, n, cotangent.kept_per_group, cotangent.rows_per_group)
