"""Where a program multiplies its sparse weights, and where it sees them dense: one walk, as the evaluation goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from msbp_jax import _compat
from msbp_jax.rules import PRODUCTS, SparseProduct
from msbp_jax.transform._discover import Place
from msbp_jax.transform._sparse_operands import passed_on, prepared_flags, sparse_product
from msbp_jax.weights import Pattern, SparseWeight, is_sparse


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """A use of a sparse weight.

    Attributes:
      leaf: Number of its parameter.
      place: Where in the program.
      operation: The sparse product; None where the weight is dense.
      primitive: Of the equation; with the reason for a dense weight, if there is one.
      x: Shape of the input of a product.
      rows: Of its result.
      dtypes: Of its input and weight.
    """

    leaf: int
    place: Place
    operation: SparseProduct | None
    primitive: str
    x: tuple[Any, ...] = ()
    rows: Any = 0
    dtypes: tuple[Any, ...] = ()


def find_uses(jaxpr: _compat.ClosedJaxpr, weights: dict[int, SparseWeight]) -> list[Use]:
    """Return the uses of sparse weights in the order in which they stand in a program.

    Args:
      jaxpr: The program.
      weights: By the number of the argument; shapes are enough.
    """
    found: list[Use] = []

    def walked(*flat: Any) -> None:
        given = jax.tree.unflatten(structure, flat)
        arguments = [_Known(number, given[number]) if number in given else None for number in range(len(variables))]
        _leave(_walk(jaxpr, arguments, (), found), (), "the model", found)

    variables = jaxpr.jaxpr.invars
    leaves, structure = jax.tree.flatten(weights)
    jax.eval_shape(walked, *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))
    return found


def _leave(results: Sequence[_Known | None], place: Place, what: str, found: list[Use]) -> None:
    """Note the weights that something returns: they are dense there."""
    found.extend(Use(k.leaf, place, None, f"what {what} returns") for k in results if k is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    leaf: int
    weight: SparseWeight


def _walk(jaxpr: Any, arguments: Sequence[_Known | None], place: Place, found: list[Use]) -> list[_Known | None]:
    env: dict[Any, _Known] = {}
    inner = jaxpr.jaxpr
    env.update({v: known for v, known in zip(inner.invars, arguments, strict=True) if known is not None})
    read = lambda atom: None if isinstance(atom, _compat.Literal) else env.get(atom)
    for number, eqn in enumerate(inner.eqns):
        known = [read(atom) for atom in eqn.invars]
        if not any(known):
            continue
        inputs = [k.weight if k else _compat.shape_of(atom) for k, atom in zip(known, eqn.invars, strict=True)]
        if known[0] is not None and (passed := passed_on(eqn, inputs)) is not None:
            env[eqn.outvars[0]] = _Known(known[0].leaf, passed)
            continue
        here = (*place, number)
        takes = prepared_flags(eqn, inputs)
        for k, take in zip(known, takes, strict=True):
            if k is not None and not take:
                reason = sparse_product(eqn, inputs)
                why = f" ({reason})" if isinstance(reason, str) and reason else ""
                found.append(Use(k.leaf, here, None, f"{eqn.primitive.name}{why}"))
        taken = [k if take else None for k, take in zip(known, takes, strict=True)]
        if not any(taken):
            continue
        if eqn.primitive.name in PRODUCTS:
            product = sparse_product(eqn, inputs)
            assert not isinstance(product, str)
            leaf = next(k.leaf for k in taken if k is not None)
            lhs, rhs, out = (_compat.shape_of(atom).shape for atom in (*eqn.invars, *eqn.outvars))
            rows = product[0].dims(lhs, rhs, out).rows
            dtypes = tuple(value.dtype for value in inputs)
            x = rhs if is_sparse(inputs[0]) else lhs
            found.append(Use(leaf, here, product[0], eqn.primitive.name, x, rows, dtypes))
            continue
        results = _inside(eqn, taken, here, found)
        env.update({v: k for v, k in zip(eqn.outvars, results, strict=True) if k is not None})
    return [read(atom) for atom in inner.outvars]


def _inside(eqn: Any, arguments: list[_Known | None], place: Place, found: list[Use]) -> list[_Known | None]:
    """Walk the bodies of an equation; what leaves a loop or a branch is dense."""
    nothing: list[_Known | None] = [None] * len(eqn.outvars)
    if eqn.primitive is _compat.cond_p:
        for number, branch in enumerate(eqn.params["branches"]):
            _leave(_walk(_compat.closed(branch), arguments[1:], (*place, number), found), place, "a branch", found)
        return nothing
    body = _compat.closed(eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["jaxpr"])
    if eqn.primitive is _compat.scan_p:
        consts, carries = _compat.scan_arity(eqn.params)
        sliced = [
            _Known(k.leaf, jax.tree.map(lambda leaf: leaf[0], k.weight)) if k and number >= consts + carries else k
            for number, k in enumerate(arguments)
        ]
        _leave(_walk(body, sliced, place, found), place, "a scan", found)
        return nothing
    return _walk(body, arguments, place, found)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightRow:
    """A sparse weight in a report.

    Attributes:
      name: Path of its parameter.
      shape: Of the dense weight.
      entries: Of each layer, padding included.
      density: Share of the entries that are there.
      products: How many products with it are sparse, in forward and backward.
      backend: What runs them.
      warning: Where it is dense, and why ("" if nowhere).
    """

    name: str
    shape: tuple[int, ...]
    entries: int
    density: float
    products: int
    backend: str
    warning: str


def describe(name: str, weight: SparseWeight, uses: Sequence[Use]) -> WeightRow:
    """Return what becomes of a sparse weight.

    Args:
      name: Path of its parameter.
      weight: The weight; shapes are enough.
      uses: Its uses.
    """
    pattern, products = weight.pattern, [use for use in uses if use.operation is not None]
    backends = dict.fromkeys(
        use.operation.backend_for(pattern, use.x, use.rows, *use.dtypes) for use in products if use.operation
    )
    dense = list(dict.fromkeys(use.primitive for use in uses if use.operation is None))
    said = [f"{' and '.join(dense)} sees the dense weight"] if dense else []
    if not products:
        said.append("no product with it is sparse")
    if "xla" in backends:
        said.append("its products run on the dense weight, made of the entries each time: slower than a dense one")
    most = max((_break_even(pattern, use) for use in products), default=1.0)
    if "unpacked" in backends:
        said.append(
            f"its products run on the dense weight, made of the entries each time, as lists are slower still above "
            f"{most:.0%} of the entries: leave it dense"
        )
    if "native" in backends and pattern.density > most:
        said.append(
            f"its products are probably slower than with a dense weight, as they are above {most:.0%} of the entries: "
            "leave it dense"
        )
    return WeightRow(
        name=name,
        shape=weight.shape,
        entries=pattern.entries,
        density=pattern.density,
        products=len(products),
        backend=" and ".join(dict.fromkeys(map(_label, backends))) or "none",
        warning="; ".join(said),
    )


def _break_even(pattern: Pattern, use: Use) -> float:
    """Return the share of the entries up to which a product is faster than with a dense weight."""
    if use.operation is None or _compat.is_symbolic(use.rows):
        return 1.0
    return use.operation.break_even(pattern, use.rows)


def _label(backend: str) -> str:
    return {"native": "native", "tiles": "xla, tiles"}.get(backend, "xla, dense")
