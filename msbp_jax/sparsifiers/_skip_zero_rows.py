"""Skipping rows that are exactly 0: exact, and cheap where there are many."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from msbp_jax.formats import Rows
from msbp_jax.kernels import live_rows
from msbp_jax.sparsifiers._base import Sparsifier, State
from msbp_jax.sparsifiers._where import Where


def skip_zero_rows() -> Sparsifier:
    r"""Leave out the rows of the gradient that are exactly 0: `S(g) = g`, at the cost of the other rows.

    It is exact: bit for bit plain JAX where no row is 0, and elsewhere to the order of sums. Rows of padding, of masked
    labels and masked losses are 0, and so are, below it, those that `sample_rows` left out where the gradient entered:
    `{"@outputs": sample_rows(...), "*": skip_zero_rows()}`.

    Rows stay 0 through everything that treats them one by one: linear layers, elementwise functions, layer norm. Below
    batch norm no row is 0, and nothing is skipped; attention fills the rows of an example of which any is kept.

    Returns:
      The sparsifier. It has no state, and serves layers of any width.

    Example:
      >>> import jax, jax.numpy as jnp, msbp_jax as msbp
      >>> f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.skip_zero_rows())
      >>> w, x, mask = jnp.ones((8, 64)), jnp.ones((4, 8)), jnp.array([1.0, 1.0, 0.0, 0.0])
      >>> float(jax.grad(lambda w: (f(w, x) * mask[:, None]).sum())(w)[0, 0])
      2.0
    """
    return _SkipZeroRows(None).sparsifier()


@dataclasses.dataclass(frozen=True)
class _SkipZeroRows:
    backend: str | None

    def sparsifier(self) -> Sparsifier:
        return Sparsifier(init=self.init, apply=self.apply, name="skip_zero_rows()", at=self.at)

    def init(self, aval: jax.ShapeDtypeStruct) -> State:
        del aval
        return ()

    def apply(self, u: jax.Array, state: State) -> tuple[Rows, State]:
        if u.shape[0] == 0:
            return Rows(u, jnp.zeros((0,), jnp.float32), unchanged=True), state
        return Rows(u, live_rows(u, backend=self.backend), unchanged=True), state

    def at(self, where: Where) -> Sparsifier:
        return dataclasses.replace(self, backend=where.maker).sparsifier()
