"""`metrics`: what a memory has to tell, as scalars by name, for TensorBoard and its like."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax._checks import is_array, is_differentiable
from msbp_jax.carriers import plain
from msbp_jax.transform import Memory, SparseFunction, SparseModule, SparseNNXModule


def metrics(memory: Any) -> dict[str, jax.Array]:
    r"""Return what the states in a memory tell of themselves: a flat dict of scalars.

        memory_norm = ||m||,   the Euclidean norm over all entries, those of all instances if layers are stacked.

    It reads the memory and nothing else, so that a step that does not call it pays nothing for it.

    Args:
      memory: A memory, as `init_memory` and `value_and_grad` return it, or a pytree that holds several; a state of NNX
        with `msbp.Memory` Variables too. Whatever else is in the pytree is passed over. For an NNX model there is
        `msbp.nnx.metrics`.

    Returns:
      Scalars by path, site and name, such as "Dense_0/kernel/memory_norm"; for several memories in one pytree, with
      their paths before. Each memorized site has a `memory_norm`, float32, in units of the gradient of the layer's
      output. A sparsifier adds more by its state: a NamedTuple with a property (or method) `metrics` that returns a
      dict of real scalars. It must reduce over all axes of its arrays, which have further leading ones where layers
      are stacked. What a field `inner` holds, the state of what is wrapped, is told too. Sites that have nothing to
      tell are left out. Under `jit` they are arrays like any other.

    Raises:
      TypeError: There is no state in `memory`; a state's own metrics are not real scalars by name.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> f = msbp.sparse_vjp(lambda p, x: x @ p["w"], msbp.memorized(msbp.top_k(k=8), decay=0.8))
      >>> p, x = {"w": jnp.ones((4, 64))}, jnp.ones((2, 4))
      >>> loss_fn = lambda p, memory, x: f(p, x, memory=memory).sum()
      >>> loss, grads, memory = msbp.value_and_grad(loss_fn)(p, f.init_memory(p, x), x)
      >>> {name: round(float(value), 2) for name, value in msbp.metrics(memory).items()}  # 0.8 in 56 of 64 features
      {'w/memory_norm': 5.99}
    """
    tree = plain(memory)
    _check_holds_states(tree)
    return _collected(tree)


def unique_name(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken: itself, or with "#2", "#3" and so on behind it."""
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _collected(tree: Any) -> dict[str, jax.Array]:
    """Return what the outermost states with something to tell contribute, by their paths."""
    found: dict[str, jax.Array] = {}
    sites: set[str] = set()
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_tells)[0]:
        if not _tells(node):
            continue
        site = _site(path, node)
        if site:  # paths differ, their names need not: {"a/b": {"c": ...}, "a": {"b/c": ...}}
            site = unique_name(site, sites)
            sites.add(site)
        for name, value in _contributed(node).items():
            found[unique_name(f"{site}/{name}" if site else name, found)] = value
    return found


def _contributed(node: Any) -> dict[str, jax.Array]:
    if isinstance(node, Memory):
        return _collected(node.get_value())
    found: dict[str, jax.Array] = {}
    if _has_own(node):
        own = node.metrics() if callable(node.metrics) else node.metrics
        if not isinstance(own, Mapping):
            raise TypeError(f"{type(node).__name__}.metrics must give a dict of scalars by name, got {own!r}.")
        found |= {str(name): _scalar(type(node).__name__, name, value) for name, value in own.items()}
    if "inner" in node._fields:
        for name, value in _collected(node.inner).items():
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


def _tells(node: Any) -> bool:
    """Whether a node is a state with metrics or with another inside, or the Variable that holds a site's."""
    return isinstance(node, Memory) or (_is_named_tuple(node) and ("inner" in node._fields or _has_own(node)))


def _has_own(node: Any) -> bool:
    """Whether a state has metrics; a *field* of that name is data of somebody's own, such as the carry of a loop."""
    return hasattr(type(node), "metrics") and "metrics" not in node._fields


def _is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _site(path: tuple[Any, ...], node: Any) -> str:
    """Return the name of a site; the attribute of an NNX model that holds its Variables goes without saying."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if isinstance(node, Memory) and parts[-2:-1] == ["memory"]:
        del parts[-2]
    return "/".join(parts)


def _check_holds_states(tree: Any) -> None:
    """Raise unless there is a state, or nothing at all; a state that has no metrics is a state too.

    Raises:
      TypeError: There are leaves, and none belongs to a state.
    """
    is_node = lambda node: _tells(node) or _is_named_tuple(node) or isinstance(node, SparseNNXModule)
    nodes = jax.tree.leaves(tree, is_leaf=is_node)
    expected = (
        "msbp.metrics takes a memory, as init_memory and value_and_grad return it, or a pytree of several, got "
        f"{type(tree).__name__}"
    )
    if any(isinstance(node, SparseNNXModule) for node in nodes):
        raise TypeError(f"{expected}, an NNX model. Use msbp.nnx.metrics(model).")
    if isinstance(tree, SparseFunction | SparseModule):
        raise TypeError(f"{expected}, a wrapped model, whose memory is apart from it: pass what init_memory returned.")
    arrays = [node for node in nodes if is_array(node)]
    unlike = any(map(is_differentiable, arrays)) or len(arrays) < len(nodes)
    if tree is None or (unlike and not any(map(is_node, nodes))):
        raise TypeError(
            f"{expected}, which holds no state of a sparsifier. A memory from a checkpoint is to be restored with a "
            "target, so that its states are no dicts; a state of your own is to be a NamedTuple."
        )
