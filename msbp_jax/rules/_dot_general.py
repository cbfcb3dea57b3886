"""The rule of a contraction with a parameter: plain forward, sparse backward.

y = x w                       what the program says, untouched
p, m' = S(g, m)               g = dL/dy; S knows what it remembers, the rule does not
dx = p wᵀ,  dw = xᵀ p         by the kernels
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from msbp_jax import _compat, kernels
from msbp_jax.formats import Columns, Format
from msbp_jax.rules._dims import Contraction, DimensionNumbers, Side, contraction
from msbp_jax.rules._state import LogKey, SiteLog, to_log
from msbp_jax.sparsifiers._base import Sparsifier, State


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """All that is static about one use of one site.

    Attributes:
      dimension_numbers: As in `lax.dot_general`.
      side: Which operand is the weight.
      sparsifier: `S`.
      precision: As in `lax.dot_general`, for the forward and all products of the backward.
      preferred_element_type: As in `lax.dot_general`.
      out_sharding: As in `lax.dot_general`.
      key: Where the new state is logged; None to log nothing.
      observe: "" in training; "sparse" logs the weight's gradient as well; "dense" does so with a dense backward.
      backend: Which backend runs the products; None chooses.
    """

    dimension_numbers: DimensionNumbers
    side: Side
    sparsifier: Sparsifier
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None
    key: LogKey | None = None
    observe: str = ""
    backend: str | None = None

    def forward(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """Return the contraction itself."""
        return lax.dot_general(
            lhs,
            rhs,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=self.out_sharding,
        )

    def contraction(self, lhs: jax.Array, rhs: jax.Array) -> Contraction:
        """Return the dimension algebra for these operands."""
        return contraction(self.dimension_numbers, lhs.shape, rhs.shape, self.side)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sparse_dot_general(rule: Rule, lhs: jax.Array, rhs: jax.Array, state: State) -> jax.Array:
    """Return `lax.dot_general(lhs, rhs)` with a sparse backward.

    Args:
      rule: What is static.
      lhs: Left operand.
      rhs: Right operand.
      state: The sparsifier's state, with a leading axis `[batch]` if the contraction has batch axes.
    """
    del state
    return rule.forward(lhs, rhs)


def _forward(rule: Rule, lhs: jax.Array, rhs: jax.Array, state: State) -> tuple[jax.Array, tuple[Any, ...]]:
    return rule.forward(lhs, rhs), (lhs, rhs, state)


def _backward(rule: Rule, residuals: tuple[Any, ...], g: jax.Array) -> tuple[tuple[Any, ...], dict[Any, Any] | None]:
    lhs, rhs, state = residuals
    dlhs, drhs, log = _products(dataclasses.replace(rule, key=None), lhs, rhs, state, g)
    return (dlhs, drhs, None), None if rule.key is None else {rule.key: log}


@functools.partial(jax.jit, static_argnums=0)  # layers of one shape are traced and lowered once
def _products(
    rule: Rule, lhs: jax.Array, rhs: jax.Array, state: State, g: jax.Array
) -> tuple[jax.Array, jax.Array, SiteLog]:
    algebra = rule.contraction(lhs, rhs)
    canonical = algebra.canonical_g(g)
    if rule.observe == "dense":
        density, new_state = jnp.ones((), jnp.float32), state
        dlhs, drhs = _dense_products(rule, lhs, rhs, g)
    else:
        p, new_state = _sparsify(rule.sparsifier, canonical, state, batched=bool(algebra.batch_shape))
        density = _density(p, algebra)
        if isinstance(p, Columns):
            x, w = (rhs, lhs) if rule.side == "lhs" else (lhs, rhs)
            dx, dw = _sparse_products(rule, algebra, x, w, p)
            dlhs, drhs = (dw, dx) if rule.side == "lhs" else (dx, dw)
        else:
            values = p.values if algebra.batch_shape else p.values[None]
            dlhs, drhs = _dense_products(rule, lhs, rhs, algebra.program_g(values, g.shape))
    extra = {"dw": dlhs if rule.side == "lhs" else drhs, "density": density} if rule.observe else {}
    return dlhs, drhs, SiteLog([to_log(leaf) for leaf in jax.tree.leaves(new_state)], extra)


_compat.define_vjp_with_logs(sparse_dot_general, _forward, _backward)


def _sparsify(sparsifier: Sparsifier, g: jax.Array, state: State, *, batched: bool) -> tuple[Format, State]:
    """Apply `S` to `[batch, rows, n]`, each batch element for itself."""
    if batched:
        return jax.vmap(sparsifier.apply)(g, state)
    return sparsifier.apply(g[0], state)


def _sparse_products(
    rule: Rule, algebra: Contraction, x: jax.Array, w: jax.Array, p: Columns
) -> tuple[jax.Array, jax.Array]:
    def products(x: jax.Array, w: jax.Array, p: Columns) -> tuple[jax.Array, jax.Array]:
        how = {"precision": rule.precision, "backend": rule.backend}
        dx = kernels.grad_input(p, w, algebra.feature_axis, **how)
        dw = kernels.grad_weight(p, x, algebra.feature_axis, **how)
        return dx.astype(x.dtype), dw.astype(w.dtype)

    canonical_x, canonical_w = algebra.canonical_x(x), algebra.canonical_w(w)
    if algebra.batch_shape:
        dx, dw = jax.vmap(products)(canonical_x, canonical_w, p)
    else:
        dx, dw = (product[None] for product in products(canonical_x[0], canonical_w[0], p))
    return algebra.program_x(dx), algebra.program_w(dw)


def _dense_products(rule: Rule, lhs: jax.Array, rhs: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(rule.forward, lhs, rhs)[1](g)


def _density(p: Format, algebra: Contraction) -> jax.Array:
    """Return the share of entries that are propagated and not 0."""
    return jnp.count_nonzero(p.values).astype(jnp.float32) / (algebra.batch * algebra.rows * algebra.n)
