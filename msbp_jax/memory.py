"""Wrappers that return a sparsifier: what is not propagated in a step is remembered and used in the next ones."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _checks
from msbp_jax.formats import Format
from msbp_jax.kernels._residual import add_memory, carried_on
from msbp_jax.sparsifiers import Sparsifier
from msbp_jax.sparsifiers._base import State


class MemorizedState(NamedTuple):
    """State of a memorized sparsifier.

    Attributes:
      residual: What was not propagated, float32, 0 at the start: `[n]` for `reduce="mean"`, `[rows, n]` for `"slot"`.
      inner: State of the wrapped sparsifier.
    """

    residual: jax.Array
    inner: State


def memorized(sparsifier: Sparsifier, decay: float, *, reduce: Literal["mean", "slot"] = "mean") -> Sparsifier:
    r"""Remember what `sparsifier` drops and add it to the next gradient (memorized sparse backpropagation).

        u = g + m,      p = S(u),      m' = decay * R(u - p),

    where `g` is the gradient of the layer's output, `p` is what both products of the backward see, and `R` is the mean
    over rows (`"mean"`) or the identity (`"slot"`).

    Args:
      sparsifier: `S`, any sparsifier.
      decay: How much of the residual is carried on, in [0, 1]; the paper's memory ratio. `decay=0` is `S` itself.
      reduce: `"mean"`: m is `[n]`, the mean of the residual over rows, added to every row, whatever the batch size.
        `"slot"`: m is `[rows, n]`, each row for itself; every step must then have the same number of rows.

    Returns:
      The sparsifier. Its memory is float32 whatever the gradient's dtype and starts at 0. Entries of the residual that
      are not finite are remembered as 0, so that one bad step cannot spoil the next; they are propagated as usual.
      Where `S` keeps everything, so does this, without memory.

    Raises:
      ValueError: `decay` outside [0, 1], or an unknown `reduce`.
      TypeError: `sparsifier` is not a `Sparsifier`, or `decay` not a number.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.memorized(msbp.top_k(density=0.04, rows_per_group=32), decay=0.8)
      memorized(top_k(density=0.04, rows_per_group=32), decay=0.8)

    References:
      Zhang et al., Memorized Sparse Backpropagation, 2019 (arXiv 1905.10194).
    """
    if not isinstance(sparsifier, Sparsifier):
        raise TypeError(f"memorized wraps a Sparsifier such as msbp.top_k(density=0.04), got {sparsifier!r}.")
    ratio = _checks.fraction("decay", decay, zero=True, meaning="share of the residual that is carried on")
    if reduce not in ("mean", "slot"):
        raise ValueError(f'reduce must be "mean" (one memory of [n]) or "slot" (one of [rows, n]), got {reduce!r}.')
    if ratio == 0:
        return sparsifier

    def init(aval: jax.ShapeDtypeStruct) -> MemorizedState:
        shape = aval.shape if reduce == "slot" else aval.shape[1:]
        return MemorizedState(jnp.zeros(shape, jnp.float32), sparsifier.init(aval))

    def apply(g: jax.Array, state: MemorizedState) -> tuple[Format, MemorizedState]:
        if sparsifier.with_memory is not None:
            p, residual, inner = sparsifier.with_memory(g, state.residual, ratio, state.inner)
            return p, MemorizedState(residual, inner)
        u = add_memory(g, state.residual)
        p, inner = sparsifier.apply(u, state.inner)
        return p.astype(g.dtype), MemorizedState(carried_on(u, p, ratio, by_slot=reduce == "slot"), inner)

    kind = "" if reduce == "mean" else ', reduce="slot"'
    return Sparsifier(
        init=init,
        apply=apply,
        name=f"memorized({sparsifier.name}, decay={ratio:g}{kind})",
        is_identity=sparsifier.is_identity,
    )
