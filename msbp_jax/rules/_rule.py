"""The rule of a contraction with a parameter: plain forward, sparse backward.

y = x w                       what the program says, untouched
p, m' = S(g, m)               g = dL/dy; S knows what it remembers, the rule does not
dx = p wᵀ,  dw = xᵀ p         by the operation
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.formats import Columns, Format
from msbp_jax.rules._dims import Side
from msbp_jax.rules._operation import Dims, Operands, Operation, dense_products
from msbp_jax.rules._state import LogKey, SiteLog, averages, to_log
from msbp_jax.sparsifiers._base import Sparsifier, State


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """All that is static about one use of one site.

    Attributes:
      operation: The contraction.
      side: Which operand is the weight.
      sparsifier: `S`.
      key: Where the new state is logged; None to log nothing.
      observe: "" in training; "sparse" logs the weight's gradient as well; "dense" does so with a dense backward.
      backend: Which backend runs the products; None chooses.
    """

    operation: Operation
    side: Side
    sparsifier: Sparsifier
    key: LogKey | None = None
    observe: str = ""
    backend: str | None = None


def sparse_contraction(rule: Rule, operands: Operands, state: State) -> jax.Array:
    """Return a contraction with a sparse backward.

    Args:
      rule: What is static.
      operands: Left and right operand, then what has no gradient.
      state: The sparsifier's state, with a leading axis `[batch]` if the contraction has batch axes.
    """
    # Within shard_map a rule may not return a gradient that varies over devices for an operand that does not.
    leaves, structure = jax.tree.flatten((operands, state))
    operands, state = jax.tree.unflatten(structure, _compat.varying_alike(leaves)[0] if leaves else leaves)
    return _contract(rule, operands, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(rule: Rule, operands: Operands, state: State) -> jax.Array:
    del state
    return rule.operation.forward(*operands)


def _forward(rule: Rule, operands: Operands, state: State) -> tuple[jax.Array, tuple[Operands, State]]:
    return rule.operation.forward(*operands), (operands, state)


def _backward(
    rule: Rule, residuals: tuple[Operands, State], g: jax.Array
) -> tuple[tuple[Any, None], dict[Any, Any] | None]:
    operands, state = residuals
    lhs, rhs, *_ = operands
    left: list[Any] = [leaf if averages(leaf) else None for leaf in jax.tree.leaves(state)]
    extra: dict[str, Any] = {"dw": lhs if rule.side == "lhs" else rhs, "density": None} if rule.observe else {}
    dlhs, drhs, log = _compat.with_automatic_sharding(
        functools.partial(_products, dataclasses.replace(rule, key=None)),
        (operands, state, g),
        (lhs, rhs, SiteLog(left, extra)),
    )
    cotangents = (dlhs, drhs, *(None for _ in operands[2:]))
    return (cotangents, None), None if rule.key is None else {rule.key: log}


@functools.partial(jax.jit, static_argnums=0)  # layers of one shape are traced and lowered once
def _products(rule: Rule, operands: Operands, state: State, g: jax.Array) -> tuple[jax.Array, jax.Array, SiteLog]:
    operation = rule.operation
    dims = operation.dims(operands[0].shape, operands[1].shape, g.shape)
    if rule.observe == "dense":
        density, new_state = jnp.ones((), jnp.float32), state
        dlhs, drhs = dense_products(operation, operands, g)
    else:
        p, new_state = _sparsify(rule.sparsifier, operation.canonical_g(g, operands), state, dims)
        density = _density(p, dims)
        if isinstance(p, Columns):
            dlhs, drhs = operation.products(operands, p, g.shape, rule.backend)
        else:
            values = p.values if dims.batch_shape else p.values[None]
            dlhs, drhs = dense_products(operation, operands, operation.program_g(values, operands, g.shape))
    extra = {"dw": dlhs if rule.side == "lhs" else drhs, "density": density} if rule.observe else {}
    return dlhs, drhs, SiteLog([to_log(leaf) for leaf in jax.tree.leaves(new_state)], extra)


_compat.define_vjp_with_logs(_contract, _forward, _backward)


def _sparsify(sparsifier: Sparsifier, g: jax.Array, state: State, dims: Dims) -> tuple[Format, State]:
    """Apply `S` to `[batch, rows, n]`, each batch element for itself."""
    if dims.batch_shape:
        return jax.vmap(sparsifier.apply)(g, state)
    return sparsifier.apply(g[0], state)


def _density(p: Format, dims: Dims) -> jax.Array:
    """Return the share of entries that are propagated and not 0."""
    return jnp.count_nonzero(p.values).astype(jnp.float32) / (dims.batch * dims.rows * dims.n)
