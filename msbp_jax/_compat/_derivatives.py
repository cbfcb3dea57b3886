"""What is known of differentiation: rules with logs, and which arrays are being differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

# The tracers of forward-mode and reverse-mode differentiation. Only the first is exported, so both go by name.
_DIFFERENTIATION_TRACERS = frozenset({"JVPTracer", "LinearizeTracer"})
# Tracers that wrap another value, unlike those that stand for a variable of a program.
_TRANSFORMATIONS = _DIFFERENTIATION_TRACERS | {"BatchTracer"}


def define_vjp_with_logs(function: Any, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
    """Give a `jax.custom_vjp` function its rules.

    The backward returns `(cotangents, logs)`; the forward is told, of each argument, whether it is differentiated.
    """
    function.defvjp_with_logs(fwd, bwd, symbolic_zeros=True)


def is_primal(node: Any) -> bool:
    """Whether `node` is an argument of a forward rule: an array with whether it is differentiated."""
    return isinstance(node, CustomVJPPrimal)


def is_symbolic_zero(cotangent: Any) -> bool:
    """Whether a cotangent is known to be 0."""
    return isinstance(cotangent, SymbolicZero)


def pull_back_with_logs(pullback: Any, cotangent: Any) -> tuple[Any, dict[Any, Any]]:
    """Apply a pullback of `jax.vjp` and return `(cotangents, logs)`, where `logs` is what the rules logged."""
    return pullback.with_logs(cotangent)


def split_branch_log(log: Any) -> tuple[Any, list[Any]] | None:
    """Split the log of a rule inside `lax.cond` into (index of the branch that ran, one log or None a branch)."""
    if type(log).__name__ == "CondSum":
        return log.index, list(log.branches)
    return None


def under_differentiation(leaf: Any) -> bool:
    """Whether `leaf` is, as far as can be seen from here, being differentiated (an enclosing jit hides it)."""
    return any(type(tracer).__name__ in _DIFFERENTIATION_TRACERS for tracer in _tracers(leaf))


def is_made_here(leaf: Any) -> bool:
    """Whether `leaf`, apart from its differentiation and `vmap`s, belongs to the program that is being traced now."""
    return _program_of(leaf) is _program_of(jnp.zeros(()))


def _program_of(leaf: Any) -> Any:
    """Return the trace of the program that a leaf belongs to; None if it belongs to none."""
    innermost = next(reversed(list(_tracers(leaf))), None)
    return getattr(innermost, "_trace", None) if type(innermost).__name__ not in _TRANSFORMATIONS else None


def _tracers(leaf: Any) -> Iterator[Any]:
    """Yield a leaf's tracers from the outermost on, through differentiation and `vmap`."""
    while isinstance(leaf, Tracer):
        yield leaf
        leaf = leaf.primal if type(leaf).__name__ in _DIFFERENTIATION_TRACERS else getattr(leaf, "val", None)
