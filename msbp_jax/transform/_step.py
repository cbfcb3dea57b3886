"""A training step of a program, dense or sparse: forward, gradients of its outputs' cotangent, optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msbp_jax._checks import is_differentiable
from msbp_jax.carriers import Carried, opened, with_memory, without_memory
from msbp_jax.transform._program import Program
from msbp_jax.weights import SparseWeight, is_sparse


@dataclasses.dataclass(frozen=True)
class Step:
    """A function and its arguments.

    Attributes:
      run: The step; it returns all that a step has to compute.
      arguments: What it is called with.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]


def cotangents_of(program: Program, share: float | None) -> dict[int, jax.Array]:
    """Return random gradients of the model's floating outputs, by their number among its results.

    Args:
      program: The program.
      share: Of the rows that are not 0, the same in all outputs; None for all.
    """
    found = {}
    for number, (aval, is_output) in enumerate(zip(program.jaxpr.out_avals, program.is_output, strict=True)):
        if not is_output or not jnp.issubdtype(aval.dtype, jnp.inexact):
            continue
        values = jax.random.normal(jax.random.key(number), aval.shape, jnp.float32)
        if share is not None and aval.shape:
            rows = aval.shape[0]
            kept = np.random.default_rng(0).permutation(rows) < max(1, round(share * rows))
            values = values * jnp.asarray(kept, values.dtype).reshape(rows, *(1 for _ in aval.shape[1:]))
        found[number] = values.astype(aval.dtype)
    return found


def make_step(
    program: Program,
    params: Any,
    cotangents: dict[int, jax.Array],
    optimizer: optax.GradientTransformation | None,
    *,
    plain: bool,
) -> Step:
    """Return a training step of a program.

    Args:
      program: The program.
      params: The pytree that its first arguments are the leaves of.
      cotangents: Of its outputs.
      optimizer: What the gradients of the parameters are handed to; None for nothing.
      plain: Whether its backward is plain JAX's, and its weights are dense.
    """
    structure: Any = jax.tree.structure(params, is_leaf=is_sparse)
    leaves = structure.flatten_up_to(params)
    weights = [leaf.dense() if plain and isinstance(leaf, SparseWeight) else leaf for leaf in leaves]
    values = [weight.values if isinstance(weight, SparseWeight) else jnp.asarray(weight) for weight in weights]
    # None is no leaf: an optimizer does not see what has no gradient.
    trained = jax.tree.unflatten(structure, [value if is_differentiable(value) else None for value in values])
    fixed = [
        weight if isinstance(weight, SparseWeight) or not is_differentiable(value) else None
        for weight, value in zip(weights, values, strict=True)
    ]
    data = program.arguments[len(leaves) :]
    start = {} if plain else program.start()
    carried = without_memory(with_memory({}, {}, start))[1]
    assert carried is not None

    def run(trained: Any, memory: Any, opt_state: Any, fixed: list[Any], data: list[Any]) -> Any:
        def forward(trained: Any, memory: Any) -> tuple[list[Any], list[Any]]:
            given = structure.flatten_up_to(trained)
            filled = [_filled(weight, value) for weight, value in zip(fixed, given, strict=True)]
            called = dataclasses.replace(program, arguments=[*filled, *data], rebuild=lambda results: results)
            results = called.run_plain() if plain else called.run(opened(Carried(memory), start))
            others = [result for number, result in enumerate(results) if number not in cotangents]
            return [results[number] for number in cotangents], others

        outputs, pull_back, others = jax.vjp(forward, trained, memory, has_aux=True)
        grads, renewed = pull_back(list(cotangents.values()))
        if optimizer is not None:
            updates, opt_state = _update(optimizer, grads, opt_state, trained, outputs, cotangents)
            grads = optax.apply_updates(trained, updates)
        return outputs, others, grads, renewed, opt_state

    opt_state = None if optimizer is None else optimizer.init(trained)
    return Step(run, (trained, carried.tree, opt_state, fixed, data))


def _update(
    optimizer: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    trained: Any,
    outputs: list[Any],
    cotangents: dict[int, jax.Array],
) -> Any:
    """Return an optimizer's updates and state; one that asks for the loss gets that whose gradient this is."""
    pairs = zip(outputs, cotangents.values(), strict=True)
    loss = sum((jnp.sum(out * g).real.astype(jnp.float32) for out, g in pairs), start=jnp.float32(0))
    try:
        return optax.with_extra_args_support(optimizer).update(grads, opt_state, trained, value=loss)
    except TypeError as error:
        raise TypeError(
            "report(measure=True) calls optimizer.update(grads, state, params, value=loss), and this optimizer needs "
            f"something else: {error}. Measure with one that does not, such as the first of the chain."
        ) from error


def _filled(weight: Any, value: Any) -> Any:
    """Return an argument of the program with the value that is trained."""
    if isinstance(weight, SparseWeight):
        return dataclasses.replace(weight, values=value)
    return weight if value is None else value
