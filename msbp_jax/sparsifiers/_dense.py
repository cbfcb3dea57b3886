"""The sparsifier that keeps everything, for a plan's exceptions."""

from __future__ import annotations

import jax

from msbp_jax.formats import Dense
from msbp_jax.sparsifiers._base import Sparsifier, State
from msbp_jax.sparsifiers._where import Stays, Where, keeps_all


def dense(*, native: bool = False) -> Sparsifier:
    r"""Keep the whole gradient: `S(u) = u`.

    A site with it is evaluated as plain JAX, bit for bit, unless `native`, and has no memory. It serves in a plan, to
    leave a layer out.

    Args:
      native: Whether convolutions have their whole backward from native kernels, where these run: on a CPU, in float32
        and bfloat16, one or two axes of pixels, without groups, not transposed. The gradients are the same to the order
        of their sums, and XLA's own mostly take 1.2 to 4 times as long. Elsewhere, and for everything else, nothing
        changes; the report says which convolutions they are. Of a native kernel there is no second derivative, no
        forward mode, and no export.

    Returns:
      The sparsifier.

    Raises:
      TypeError: `native` is not a bool.

    Example:
      >>> import msbp_jax as msbp
      >>> plan = {"head/*": msbp.dense(), "*": msbp.top_k(density=0.04, rows_per_group=32)}
      >>> faster = {"Conv_*": msbp.dense(native=True), "*": msbp.dense()}  # exact
    """
    if not isinstance(native, bool):
        raise TypeError(f"native must be True or False, got {native!r}.")
    if not native:
        return Sparsifier(init=_init, apply=_apply, name="dense()", at=_at)
    return Sparsifier(init=_init, apply=_apply_natively, name="dense(native=True)", at=_at_native)


def _init(aval: jax.ShapeDtypeStruct) -> State:
    del aval
    return ()


def _apply(u: jax.Array, state: State) -> tuple[Dense, State]:
    return Dense(u), state


def _apply_natively(u: jax.Array, state: State) -> tuple[Dense, State]:
    return Dense(u, native=True), state


def _at(where: Where) -> Stays:
    return keeps_all("dense()", where.n)


def _at_native(where: Where) -> Sparsifier | Stays:
    return dense(native=True) if where.native_examples else keeps_all("dense(native=True)", where.n)
