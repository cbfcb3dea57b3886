"""What a site's backward takes, dense and sparse: it is traced, and its equations are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.formats import Columns, Format
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.choice.costs.work import Work, joined, work_of
from msbp_jax.kernels.choice.layer import layer_of
from msbp_jax.kernels.choice.order import expected_seconds, fastest_first
from msbp_jax.rules._contraction import Side
from msbp_jax.rules._norms import norms
from msbp_jax.rules._operation import Dims, Operation
from msbp_jax.rules._products import Path, dense_products, path_of, products
from msbp_jax.rules._rule import sparsify
from msbp_jax.sparsifiers._base import Sparsifier, Weighted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A contraction, its operands and which of their gradients are needed.

    Attributes:
      operation: The contraction.
      side: Which operand is the weight.
      operands: Shapes and dtypes of both.
      out: Shape and dtype of the result.
      of_inputs: Whether the gradient of the inputs is needed.
      of_weight: Whether that of the weight is.
    """

    operation: Operation
    side: Side
    operands: tuple[Any, Any]
    out: Any
    of_inputs: bool
    of_weight: bool = True

    @property
    def dims(self) -> Dims:
        """Canonical sizes."""
        return self.operation.dims(self.operands[0].shape, self.operands[1].shape, self.out.shape)


def forward_work(use: Use) -> Work:
    """Return the work of the contraction itself."""
    return work_of(_traced(use.operation.forward, *use.operands))


def dense_work(use: Use) -> Work:
    """Return the work of its backward as plain JAX has it."""
    backward = lambda operands, g: dense_products(use.operation, operands, g)
    return work_of(_traced(backward, use.operands, use.out), wanted=_wanted(use, of_inputs=True, of_weight=True))


def sparse_work(use: Use, sparsifier: Sparsifier, backend: str | None, share: float) -> Work:
    """Return the work of its backward with a sparsifier.

    Args:
      use: The contraction.
      sparsifier: What chooses.
      backend: Backend of the products; None to choose.
      share: What is kept where only the run tells.
    """
    work, p = selection(use, sparsifier)
    layer = layer_of(p, use.dims.m) if isinstance(p, Columns) else None
    if layer is not None and target.platform() != "cpu":
        # The kernels there are known by their rates alone, and both products together.
        work = {"seconds": (use.dims.batch * expected_seconds("select", layer),)}
        if path_of(p, use.operation, use.operands[0].shape, use.operands[1].shape, backend) is Path.ROWS:
            path = backend or fastest_first(layer)[0]
            return joined(work, {"seconds": (use.dims.batch * expected_seconds(path, layer),)})
    of_x, of_w = p.parts
    if of_w is of_x:
        return joined(work, _products_work(use, of_x, backend, share, of_inputs=True, of_weight=True))
    return joined(
        work,
        _products_work(use, of_x, backend, share, of_inputs=True, of_weight=False),
        _products_work(use, of_w, backend, share, of_inputs=False, of_weight=True),
    )


def selection(use: Use, sparsifier: Sparsifier) -> tuple[Work, Format]:
    """Return the work of what chooses, and what it makes, in shapes."""
    dims = use.dims

    def choose(operands: Any, g: jax.Array) -> Any:
        seen = norms(sparsifier.wants, use.operation, operands, use.side, dims, g.shape)
        state = sparsifier.init(jax.ShapeDtypeStruct((dims.rows, dims.n), g.dtype))
        if dims.batch_shape:
            state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (dims.batch, *leaf.shape)), state)
        return tuple(sparsify(sparsifier, use.operation.canonical_g(g, operands), state, dims, seen))

    return work_of(_traced(choose, use.operands, use.out)), Weighted(*jax.eval_shape(choose, use.operands, use.out)).p


def entering_work(sparsifier: Sparsifier, cotangent: Any) -> tuple[Work, float | None]:
    """Return the work of choosing of the gradient that enters a model, and the share that is kept if that is known.

    Args:
      sparsifier: What chooses.
      cotangent: Shape and dtype of all outputs' gradients side by side.
    """
    dims = Dims((), cotangent.shape[0], cotangent.shape[0], 0, cotangent.shape[1])

    def choose(g: jax.Array) -> Any:
        p, total, weight = sparsify(sparsifier, g[None], sparsifier.init(cotangent), dims, {})
        return p, p.materialize(), total, weight

    return work_of(_traced(choose, cotangent)), jax.eval_shape(choose, cotangent)[0].kept_share()


def _products_work(use: Use, p: Format, backend: str | None, share: float, *, of_inputs: bool, of_weight: bool) -> Work:
    wanted = _wanted(use, of_inputs=of_inputs, of_weight=of_weight)
    known = p.kept_share()
    share = share if known is None else known
    dims = use.dims
    made = lambda operands, p: products(use.operation, operands, p, dims, use.out.shape, backend, assumed=share)
    return work_of(_traced(made, use.operands, p), share, wanted)


def _wanted(use: Use, *, of_inputs: bool, of_weight: bool) -> Sequence[bool]:
    """Return which of the gradients of left and right operand are needed."""
    of_inputs, of_weight = of_inputs and use.of_inputs, of_weight and use.of_weight
    return (of_weight, of_inputs) if use.side == "lhs" else (of_inputs, of_weight)


def _traced(function: Callable[..., Any], *arguments: Any) -> _compat.ClosedJaxpr:
    return jax.make_jaxpr(function)(*arguments)
