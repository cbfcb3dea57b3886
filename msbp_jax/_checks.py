"""Checks of what users pass, shared by the public functions: expected, got, and what to do instead."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def positive_int(name: str, value: object, meaning: str) -> int:
    """Return `value` as an int of at least 1, or raise with the argument's name and meaning."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer ({meaning}), got {value!r}.") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1 ({meaning}), got {number}.")
    return number


def fraction(name: str, value: object, *, zero: bool, meaning: str) -> float:
    """Return `value` as a float in (0, 1], or in [0, 1] where `zero` is allowed, or raise."""
    interval = "[0, 1]" if zero else "(0, 1]"
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a number in {interval} ({meaning}), got {value!r}.") from None
    if not math.isfinite(number) or number > 1 or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must lie in {interval} ({meaning}), got {number}.")
    return number


def number(name: str, value: object, meaning: str) -> float:
    """Return `value` as a float, or raise with the argument's name and meaning; one too large becomes infinite."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
    except TypeError:
        raise TypeError(f"{name} must be a number ({meaning}), got {value!r}.") from None


def check_parameters(keyed: list[tuple[Any, Any]]) -> None:
    """Raise unless there are parameters and all of them are arrays. Those without a fraction are constants.

    Raises:
      TypeError: A leaf is not an array.
      ValueError: There is no leaf, or none that can be differentiated.
    """
    if not keyed:
        raise ValueError(
            "The function has no parameters: its first argument has no leaves. Expected f(params, *args) with the "
            "arrays to be differentiated in params."
        )
    for path, leaf in keyed:
        if not is_array(leaf) and not isinstance(leaf, np.number):
            raise TypeError(f"Parameter {path_name(path)} must be an array, got {leaf!r}. Move it out of params.")
    if not any(is_differentiable(leaf) for _, leaf in keyed):
        dtypes = sorted({str(leaf.dtype) for _, leaf in keyed})
        raise ValueError(
            f"None of the parameters can be differentiated: expected a floating dtype, got {', '.join(dtypes)}."
        )


def is_differentiable(leaf: Any) -> bool:
    """Whether an array has a gradient: its dtype has fractions."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, a tracer or a ShapeDtypeStruct, as opposed to a flag or a number."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":  # objects, text and times: JAX has no such dtypes
        return False
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def path_name(path: tuple[Any, ...]) -> str:
    """Return a pytree path as it names a site: `Dense_0/kernel`; `params` for a bare array.

    An NNX Variable is a node of its own, whose only child is called "value": that goes without saying.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"
