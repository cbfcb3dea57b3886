"""`metrics`: what a memory has to tell, as scalars by name, for TensorBoard and its like."""

from __future__ import annotations

from typing import Any

import jax

from msbp_jax._checks import is_array, is_differentiable
from msbp_jax.carriers import plain
from msbp_jax.sparsifiers._metrics import is_named_tuple, metrics_of, tells, unique_name
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


def _collected(tree: Any) -> dict[str, jax.Array]:
    """Return what the outermost states with something to tell contribute, by their paths."""
    found: dict[str, jax.Array] = {}
    sites: set[str] = set()
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_tells)[0]:
        if not _tells(node):
            continue
        site = _site(path, node)
        if site:  # different paths may have the same name: {"a/b": {"c": ...}, "a": {"b/c": ...}}
            site = unique_name(site, sites)
            sites.add(site)
        for name, value in metrics_of(node.get_value() if isinstance(node, Memory) else node).items():
            found[unique_name(f"{site}/{name}" if site else name, found)] = value
    return found


def _tells(node: Any) -> bool:
    """Whether a node is a state with something to tell, or the Variable that holds a site's."""
    return isinstance(node, Memory) or tells(node)


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
    is_node = lambda node: _tells(node) or is_named_tuple(node) or isinstance(node, SparseNNXModule)
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
