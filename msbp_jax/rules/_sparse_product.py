"""From a contraction and a sparse weight to the operation that multiplies its entries alone."""

from __future__ import annotations

from typing import Any

import jax

from msbp_jax.rules._convolution import Convolution
from msbp_jax.rules._dot_general import DotGeneral
from msbp_jax.rules._operation import Operation
from msbp_jax.rules._sparse_convolution import SparseConvolution, sparse_convolution_of
from msbp_jax.rules._sparse_dot import SparseDot, operands_of, sparse_dot_of
from msbp_jax.weights import SparseWeight

SparseProduct = SparseDot | SparseConvolution

# The primitives that have a sparse form.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


def sparse_product_of(dense: Operation, x: Any, weight: SparseWeight) -> tuple[SparseProduct, tuple[Any, ...]] | str:
    """Return an operation and its operands; where the weight has to be dense, the reason, if there is one to tell.

    Args:
      dense: The contraction with the dense weight.
      x: Its other operand; the shape is enough.
      weight: The weight.
    """
    if isinstance(dense, Convolution):
        convolution = sparse_convolution_of(dense, weight)
        if isinstance(convolution, str):
            return convolution
        return convolution, (x, weight.values, *jax.tree.leaves(weight.pattern))
    assert isinstance(dense, DotGeneral)
    dot = sparse_dot_of(dense, weight)
    return "" if dot is None else (dot, operands_of(dense, x, weight))
