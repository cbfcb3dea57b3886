"""What an equation does with a sparse weight: multiplies it, passes it on, takes it inside, or sees it dense.

| equation | |
|---|---|
| a matrix product over all of its inputs, or all of its features; a convolution | a sparse product |
| a cast; a transposition that exchanges inputs and features; a change of type within shard_map | a sparse weight |
| jit, checkpoint, cond; scan, where it is a constant or runs through stacked layers | goes on inside |
| anything else | gets the dense weight |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.rules import PRODUCTS, Operation, SparseProduct, operation_of, sparse_product_of
from msbp_jax.weights import SparseWeight, is_sparse


def dense(value: Any) -> Any:
    """Return a sparse weight as a dense array, and anything else as it is."""
    return value.dense() if isinstance(value, SparseWeight) else value


def passed_on(eqn: _compat.JaxprEqn, inputs: Sequence[Any]) -> SparseWeight | None:
    """Return the result of an equation that only casts or turns a sparse weight; None of any other."""
    weight, params = inputs[0], eqn.params
    if not isinstance(weight, SparseWeight):
        return None
    match eqn.primitive.name:
        case "convert_element_type" if jnp.issubdtype(params["new_dtype"], jnp.floating):
            return weight.astype(params["new_dtype"])
        case "transpose":
            return weight.transposed(tuple(params["permutation"]))
        case "pvary":
            return weight.varying_over(tuple(params["axes"]))
        case "copy" | "copy_p":
            return weight
    return None


def prepared(eqn: _compat.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs of an equation, dense but for those sparse weights that it can take."""
    return [value if taken else dense(value) for value, taken in zip(inputs, prepared_flags(eqn, inputs), strict=True)]


def prepared_flags(eqn: _compat.JaxprEqn, inputs: Sequence[Any]) -> list[bool]:
    """Return for each input whether it can be a sparse weight."""
    takes = _takes(eqn, inputs)
    return [takes(number) for number in range(len(inputs))]


def sparse_product(eqn: _compat.JaxprEqn, inputs: Sequence[Any]) -> tuple[SparseProduct, tuple[Any, ...]] | str:
    """Return the operation and operands of a product with a sparse weight; if it is none, the reason, or ""."""
    if eqn.primitive.name not in PRODUCTS or sum(map(is_sparse, inputs)) != 1:
        return ""
    side = "lhs" if is_sparse(inputs[0]) else "rhs"
    weight, x = (inputs[0], inputs[1]) if side == "lhs" else (inputs[1], inputs[0])
    try:
        dense: Operation = operation_of(eqn.primitive.name, dict(eqn.params), side)  # type: ignore[arg-type]
    except NotImplementedError as error:
        return str(error)
    return sparse_product_of(dense, x, weight)


def _takes(eqn: _compat.JaxprEqn, inputs: Sequence[Any]) -> Callable[[int], bool]:
    """Return whether an equation can take a sparse weight as its input of that number."""
    nowhere: Callable[[int], bool] = lambda number: False
    if eqn.primitive.name in PRODUCTS:
        yes = not isinstance(sparse_product(eqn, inputs), str)
        return lambda number: yes
    if _compat.left_alone(eqn):
        return nowhere
    if eqn.primitive is _compat.jit_p:
        free = [type(sharding).__name__ == "UnspecifiedValue" for sharding in eqn.params["in_shardings"]]
        return lambda number: free[number]
    if eqn.primitive in (_compat.closed_call_p, _compat.remat_p, _compat.cond_p):
        return lambda number: True
    if eqn.primitive is _compat.scan_p:
        consts, carries = _compat.scan_arity(eqn.params)
        stacked = [is_sparse(value) and value.values.ndim > 1 for value in inputs]
        return lambda number: number < consts or (number >= consts + carries and stacked[number])
    return nowhere
