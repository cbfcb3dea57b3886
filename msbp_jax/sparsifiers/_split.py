"""One sparsifier for the gradient of the inputs, another for that of the weight."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from msbp_jax import _compat
from msbp_jax.formats import Format, Split
from msbp_jax.sparsifiers._base import Sparsifier, State, Weighted, serving
from msbp_jax.sparsifiers._dense import dense
from msbp_jax.sparsifiers._weighted import apply_weighted, settled
from msbp_jax.sparsifiers._where import Stays, Where


class SplitState(NamedTuple):
    """State of a split sparsifier.

    Attributes:
      dx: State of the one that the gradient of the inputs sees.
      dw: State of the one that the gradient of the weight sees.
    """

    dx: State
    dw: State


_compat.serializable(SplitState)


def split(*, dx: Sparsifier, dw: Sparsifier) -> Sparsifier:
    r"""Use one sparsifier for the gradient of the inputs, and another for that of the weight.

        dx = S_dx(g) wᵀ,      dw = xᵀ S_dw(g).

    What is left out of dx is missing in all layers below; what is left out of dw is missing in this layer alone. So dx
    can be left dense where a bias would compound, as in transformers.

    Args:
      dx: What the gradient of the inputs sees; `msbp.dense()` for all of it.
      dw: What the gradient of the weight sees.

    Returns:
      The sparsifier; its state is both states. `memorized` goes inside: `split(dx=dense(), dw=memorized(...))`.

    Raises:
      TypeError: One of them is not a `Sparsifier`.

    Example:
      >>> import msbp_jax as msbp
      >>> msbp.split(dx=msbp.dense(), dw=msbp.top_k(density=0.1, rows_per_group=32))
      split(dx=dense(), dw=top_k(density=0.1, rows_per_group=32))
    """
    for name, sparsifier in (("dx", dx), ("dw", dw)):
        if not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"split takes sparsifiers, such as {name}=msbp.dense(), got {name}={sparsifier!r}.")
    return _Split(dx, dw).sparsifier()


@dataclasses.dataclass(frozen=True)
class _Split:
    dx: Sparsifier
    dw: Sparsifier

    def sparsifier(self) -> Sparsifier:
        return Sparsifier(
            init=self.init,
            apply=self.apply,
            name=f"split(dx={self.dx}, dw={self.dw})",
            at=self.at,
            weighted=self.weighted,
            per_device=self.dx.per_device or self.dw.per_device,
            wants=tuple(dict.fromkeys((*self.dx.wants, *self.dw.wants))),
            remembers=self.dx.remembers and self.dw.remembers,
        )

    def at(self, where: Where) -> Sparsifier | Stays:
        parts = serving(self.dx, where), serving(self.dw, where)
        stay = [part for part in parts if isinstance(part, Stays)]
        if len(stay) == 2:
            return Stays("; ".join(dict.fromkeys(part.reason for part in stay)), all(part.by_choice for part in stay))
        dx, dw = (dense() if isinstance(part, Stays) else part for part in parts)
        return dataclasses.replace(self, dx=dx, dw=dw).sparsifier()

    def init(self, aval: jax.ShapeDtypeStruct) -> SplitState:
        return SplitState(self.dx.init(aval), self.dw.init(aval))

    def apply(self, u: jax.Array, state: SplitState, **seen: jax.Array) -> tuple[Format, SplitState]:
        p, total, weight = self.weighted(u, state, **seen)
        return p, settled(state, total, weight)

    def weighted(self, u: jax.Array, state: SplitState, **seen: jax.Array) -> Weighted:
        def part(sparsifier: Sparsifier, state: State) -> Weighted:
            return apply_weighted(sparsifier, u, state, **{name: seen[name] for name in sparsifier.wants})

        dx, dw = part(self.dx, state.dx), part(self.dw, state.dw)
        states = SplitState(dx.total, dw.total), SplitState(dx.weight, dw.weight)
        return Weighted(Split(dx.p, dw.p), *states)
