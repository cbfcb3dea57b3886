"""What states tell of themselves: scalars by name, which `msbp.metrics` and `msbp.diagnose` hand on.

A state that is a NamedTuple may have a property (or method) `metrics`, a dict of real scalars. What a field `inner`
holds, the state of what is wrapped, is told too.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax._checks import is_array


def metrics_of(state: Any) -> dict[str, jax.Array]:
    """Return what a state tells or, where it is made of several, what each of them does, with its path before.

    Raises:
      TypeError: Its metrics are not real scalars by name.
    """
    found: dict[str, jax.Array] = {}
    for path, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=tells)[0]:
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        for name, value in _told(node).items() if tells(node) else ():
            found[unique_name(f"{place}/{name}" if place else name, found)] = value
    return found


def unique_name(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken: itself, or with "#2", "#3" and so on behind it."""
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def tells(node: Any) -> bool:
    """Whether a node is a state with metrics, or with another inside."""
    return is_named_tuple(node) and ("inner" in node._fields or _has_own(node))


def is_named_tuple(node: Any) -> bool:
    """Whether a node is a NamedTuple, as states are."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _told(node: Any) -> dict[str, jax.Array]:
    found: dict[str, jax.Array] = {}
    if _has_own(node):
        scalars = node.metrics() if callable(node.metrics) else node.metrics
        if not isinstance(scalars, Mapping):
            raise TypeError(f"{type(node).__name__}.metrics must give a dict of scalars by name, got {scalars!r}.")
        found |= {str(name): _scalar(type(node).__name__, name, value) for name, value in scalars.items()}
    for name, value in metrics_of(node.inner).items() if "inner" in node._fields else ():
        found[unique_name(name, found)] = value
    return found


def _scalar(state: str, name: object, value: Any) -> jax.Array:
    known = is_array(value) or isinstance(value, np.generic | float | int)
    if known and jnp.shape(value) == () and not jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        return jnp.asarray(value)
    got = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}" if known else repr(value)
    raise TypeError(
        f"{state}.metrics[{name!r}] must be a real scalar, got {got}. Reduce it over all axes of the state's arrays: "
        "where layers are stacked they have further leading ones."
    )


def _has_own(node: Any) -> bool:
    """Whether a state has metrics; a *field* of that name is data of somebody's own, such as the carry of a loop."""
    return hasattr(type(node), "metrics") and "metrics" not in node._fields
