"""The sparsifier that keeps everything, for a plan's exceptions."""

from __future__ import annotations

import jax

from msbp_jax.formats import Dense
from msbp_jax.sparsifiers._base import Sparsifier, State
from msbp_jax.sparsifiers._where import Stays, Where, keeps_all


def dense() -> Sparsifier:
    r"""Keep the whole gradient: `S(u) = u`.

    A site with it is evaluated as plain JAX, bit for bit, and has no memory. It serves in a plan, to leave a layer out.

    Returns:
      The sparsifier.

    Example:
      >>> import msbp_jax as msbp
      >>> plan = {"head/*": msbp.dense(), "*": msbp.top_k(density=0.04, rows_per_group=32)}
    """
    return Sparsifier(init=_init, apply=_apply, name="dense()", at=_at)


def _init(aval: jax.ShapeDtypeStruct) -> State:
    del aval
    return ()


def _apply(u: jax.Array, state: State) -> tuple[Dense, State]:
    return Dense(u), state


def _at(where: Where) -> Stays:
    return keeps_all("dense()", where.n)
