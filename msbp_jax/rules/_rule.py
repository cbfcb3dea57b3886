"""The rule of a contraction with a parameter: plain forward, sparse backward.

y = x w                       what the program says, untouched
p, m' = S(g, m)               g = dL/dy; S knows what it remembers, the rule does not
dx = p wᵀ,  dw = xᵀ p         by the operation
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.carriers import Carriers, each_member, given, member_keys
from msbp_jax.formats import Format
from msbp_jax.rules._contraction import Side
from msbp_jax.rules._norms import norms
from msbp_jax.rules._operation import Dims, Operands, Operation
from msbp_jax.rules._products import dense_products, products
from msbp_jax.sparsifiers._base import Sparsifier, State, Weighted
from msbp_jax.sparsifiers._keys import Kinds, bits_as_keys, keys_as_bits, keys_of_devices
from msbp_jax.sparsifiers._metrics import metrics_of
from msbp_jax.sparsifiers._weighted import apply_weighted, averages, settled


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """All that is static about one use of one site.

    Attributes:
      operation: The contraction.
      side: Which operand is the weight.
      sparsifier: `S`.
      name: The site's, for messages.
      key: Where what is observed is logged; "" to log nothing.
      observe: "" in training; "sparse" logs the weight's gradient; "dense" does so with a dense backward.
      backend: Which backend runs the products; None chooses.
      kinds: Which leaves of the state are PRNG keys, and of which kind; inside they are passed on as bits.
    """

    operation: Operation
    side: Side
    sparsifier: Sparsifier
    name: str = ""
    key: str = ""
    observe: str = ""
    backend: str | None = None
    kinds: Kinds = ()


class Site(NamedTuple):
    """What a site has besides its operands.

    Attributes:
      state: The sparsifier's state, with a leading axis `[batch]` if the contraction has batch axes.
      carriers: Those of each leaf of the state; None where its new state is not asked for.
    """

    state: State
    carriers: list[Carriers] | None


def sparse_contraction(rule: Rule, operands: Operands, site: Site) -> jax.Array:
    """Return a contraction with a sparse backward.

    Args:
      rule: What is static.
      operands: Left and right operand, then what has no gradient.
      site: State, and carriers of the new state.
    """
    state, kinds = keys_as_bits(keys_of_devices(site.state, operands))
    rule, site = dataclasses.replace(rule, kinds=kinds), site._replace(state=state)
    # Within shard_map a rule may not return a gradient that varies over devices for an operand that does not.
    leaves, structure = jax.tree.flatten((operands, site))
    operands, site = jax.tree.unflatten(structure, _compat.varying_alike(leaves)[0] if leaves else leaves)
    return _contract(rule, operands, site)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(rule: Rule, operands: Operands, site: Site) -> jax.Array:
    del site
    return rule.operation.forward(*operands)


def _forward(rule: Rule, operands: Any, site: Any) -> tuple[jax.Array, tuple[Operands, Site] | None]:
    """Run the forward; of an argument it is known whether it is differentiated.

    Where no operand is, the backward has nothing to do; that the carriers are does not count.

    Raises:
      ValueError: An operand is differentiated and the carriers are not: the new state would be lost.
    """
    perturbed = lambda tree: any(leaf.perturbed for leaf in jax.tree.leaves(tree, is_leaf=_compat.is_primal))
    differentiated, returned = perturbed(operands[:2]), perturbed(site.carriers)
    operands, site = jax.tree.map(lambda leaf: leaf.value, (operands, site), is_leaf=_compat.is_primal)
    if not differentiated:
        return rule.operation.forward(*operands), None
    if jax.tree.leaves(site.carriers) and not returned:
        raise ValueError(
            f"The new memory of site {rule.name} cannot leave the backward pass: either the memory went through "
            "stop_gradient inside the loss, which it needs not, as it is not differentiated; or the loss itself "
            "differentiates the wrapped model (a gradient penalty, a Hessian-vector product), for which there is no "
            "memory. Take the stop_gradient away; for derivatives inside the loss, call the plain model that was "
            "wrapped."
        )
    return rule.operation.forward(*operands), (operands, site)


def _backward(
    rule: Rule, residuals: tuple[Operands, Site] | None, g: Any
) -> tuple[tuple[Any, Any], dict[Any, Any] | None]:
    if residuals is None or _compat.is_symbolic_zero(g):
        return (None, None), None
    operands, (state, carriers) = residuals
    lhs, rhs, *_ = operands
    asked = carriers if carriers and rule.observe != "dense" else []
    weight = lhs if rule.side == "lhs" else rhs
    dlhs, drhs, returned, observed = _compat.with_automatic_sharding(
        functools.partial(_products, dataclasses.replace(rule, name="", key=""), bool(rule.key), bool(asked)),
        (operands, state, g),
        (lhs, rhs, asked, {"dw": weight, "density": None, "norm": None} if rule.key else {}),
    )
    cotangents = (dlhs, drhs, *(None for _ in operands[2:]))
    returned = jax.tree.map(_compat.varying_like, returned, asked)
    return (cotangents, Site(None, returned or None)), {rule.key: observed} if rule.key else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # layers of one shape are traced and lowered once
def _products(
    rule: Rule, observed: bool, remembers: bool, operands: Operands, state: State, g: jax.Array
) -> tuple[jax.Array, jax.Array, list[Carriers], dict[str, jax.Array]]:
    operation, state = rule.operation, bits_as_keys(state, rule.kinds)
    dims = operation.dims(operands[0].shape, operands[1].shape, g.shape)
    density = jnp.ones((), jnp.float32)
    if rule.observe == "dense":
        total, weight = state, state
        dlhs, drhs = dense_products(operation, operands, g)
    else:
        seen = norms(rule.sparsifier.wants, operation, operands, rule.side, dims, g.shape)
        p, total, weight = sparsify(rule.sparsifier, operation.canonical_g(g, operands), state, dims, seen)
        density = _density(p, dims) if observed else density
        of_x, of_w = p.parts
        dlhs, drhs = products(operation, operands, of_x, dims, g.shape, rule.backend)
        if of_w is not of_x:  # XLA drops the product of each pair that is not used
            other = products(operation, operands, of_w, dims, g.shape, rule.backend)
            dlhs, drhs = (other[0], drhs) if rule.side == "lhs" else (dlhs, other[1])
    returned = returned_state(state, total, weight, g) if remembers else []
    look: dict[str, jax.Array] = {}
    if observed:
        new = settled(state, total, weight) if rule.observe == "sparse" else state
        norm = _memory_norm(new)
        look = {"dw": dlhs if rule.side == "lhs" else drhs, "density": density, "norm": norm}
    return dlhs, drhs, returned, look


def _memory_norm(state: State) -> jax.Array:
    """Return what a state calls the norm of its memory; of one that has no such metric, the norm of its numbers."""
    told = metrics_of(state)
    norms = [norm for name, norm in told.items() if name.split("/")[-1].split("#")[0] == "memory_norm"]
    norms = norms or [jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(state) if averages(leaf)]
    return jnp.sqrt(sum((norm.astype(jnp.float32) ** 2 for norm in norms), jnp.zeros((), jnp.float32)))


def returned_state(state: State, total: State, weight: State, g: jax.Array) -> list[Carriers]:
    """Return the cotangents of the carriers of every leaf; numbers depend on g by their weights, the rest may not."""
    leaves = zip(*map(jax.tree.leaves, (state, total, weight)), strict=True)
    return [
        cotangents if averages(old) else tuple(each_member(cotangent, g) for cotangent in cotangents)
        for old, cotangents in ((leaf[0], given(*leaf)) for leaf in leaves)
    ]


_compat.define_vjp_with_logs(_contract, _forward, _backward)


def sparsify(sparsifier: Sparsifier, g: jax.Array, state: State, dims: Dims, seen: dict[str, jax.Array]) -> Weighted:
    """Apply `S` to `[batch, rows, n]`, each batch element for itself."""
    apply = lambda g, state, seen: tuple(apply_weighted(sparsifier, g, state, **seen))
    state = jax.tree.map(lambda leaf: member_keys(leaf, g), state)
    if dims.batch_shape:
        return Weighted(*jax.vmap(apply)(g, state, seen))
    return Weighted(*apply(g[0], state, {name: norms[0] for name, norms in seen.items()}))


def _density(p: Format, dims: Dims) -> jax.Array:
    """Return the share of entries that are propagated and not 0."""
    kept = jax.vmap(lambda p: p.entries())(p).sum() if dims.batch_shape else p.entries()
    return kept / float(dims.batch * dims.rows * dims.n)  # a float: in a large layer an int32 would overflow
