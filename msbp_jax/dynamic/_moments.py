"""What an optimizer holds in the shape of a sparse weight: where it is, so that it can follow the weight.

`optax.tree_utils.tree_map_params` tells, of every leaf of a state, which parameter it belongs to: through chains,
masks, partitions, injected hyperparameters and accumulated gradients. It gives `tx.init` a placeholder, which a
user's own function of the parameters, one that labels them say, does not take; then it is told by shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from msbp_jax._checks import path_name

type Moves = Mapping[str, Callable[[jax.Array], jax.Array]]


class _Owner:
    """The parameter that a leaf belongs to; a leaf of a pytree itself."""

    def __init__(self, name: str, leaf: Any) -> None:
        self.name, self.shape = name, tuple(np.shape(leaf))


class _Found:
    """What a leaf of a state is; a leaf of a pytree itself."""

    def __init__(self, name: str | None = None, error: str | None = None) -> None:
        self.name, self.error = name, error


def owners(tx: Any, opt_state: Any, params: Any, moving: Mapping[str, Any]) -> list[str | None]:
    """Return of which weight each leaf of an optimizer's state is, or None where it is of none of these.

    Args:
      tx: The optimizer.
      opt_state: Its state.
      params: Parameters that it is of.
      moving: Paths of the weights whose entries change.

    Returns:
      In the order of `jax.tree.leaves(opt_state)`.

    Raises:
      TypeError: `tx` is no optimizer.
      ValueError: The state is of other parameters, or has something of such a weight in another shape.
    """
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"update takes the optimizer first, an optax.GradientTransformation, got {tx!r}.")

    def found(leaf: Any, owner: _Owner) -> Any:
        if _is_masked(leaf):
            return leaf
        if not isinstance(owner, _Owner) or owner.name not in moving:
            return _Found()
        shape = tuple(np.shape(leaf))
        if shape == owner.shape:
            return _Found(owner.name)
        if np.size(leaf) == 1:  # a number for the whole weight, or a place that is not used
            return _Found()
        return _Found(error=f"The optimizer holds {shape} for {owner.name}, whose parameter has shape {owner.shape}: ")

    named = jax.tree_util.tree_map_with_path(lambda path, leaf: _Owner(path_name(path), leaf), params)
    try:
        marked = optax.tree_utils.tree_map_params(
            tx, found, opt_state, named, transform_non_params=lambda _: _Found(), is_leaf=_is_masked
        )
        alike = _structure(marked) == _structure(opt_state)
        leaves = jax.tree.leaves(marked)
    except (TypeError, ValueError, AttributeError, AssertionError):
        alike, leaves = _by_shape(tx, opt_state, params, named, found)
    if not alike:
        raise ValueError(_NOT_OF_TX)
    if wrong := [leaf.error for leaf in leaves if leaf.error]:
        raise ValueError(
            wrong[0] + "it is the state of another stage, or one that does not go entry by entry, as factors "
            "(Adafactor), histories (L-BFGS) and flattened parameters (optax.flatten) do not. Restore both of one "
            "step, or take an optimizer whose moments have the shape of their parameter."
        )
    return [leaf.name for leaf in leaves]


def _by_shape(
    tx: Any, opt_state: Any, params: Any, named: Any, found: Callable[[Any, _Owner], _Found]
) -> tuple[bool, list[_Found]]:
    """Return whether a state is of these parameters, and what its leaves are: those that grow where a weight does."""
    new = jax.eval_shape(tx.init, params)
    if _structure(new) != _structure(opt_state):
        return False, []
    before, leaves = jax.tree.leaves(new), jax.tree.leaves(opt_state)
    marked = [_Found() for _ in leaves]
    for owner in jax.tree.leaves(named):
        if found(np.zeros(owner.shape, bool), owner).name is None:
            continue
        longer = lambda leaf, of, owner=owner: (
            jax.ShapeDtypeStruct((*of.shape[:-1], of.shape[-1] + 1), leaf.dtype) if of is owner else leaf
        )
        after = jax.tree.leaves(jax.eval_shape(tx.init, jax.tree.map(longer, params, named)))
        if len(after) != len(before):
            return False, []
        for number, (old, grown) in enumerate(zip(before, after, strict=True)):
            if old.shape != grown.shape:
                marked[number] = found(leaves[number], owner)
    return True, marked


_NOT_OF_TX = (
    "The optimizer's state is not one that tx.init makes of these parameters, so that its moments cannot follow their "
    'weights. Expected the state of tx.init(variables["params"]), and the same tx.'
)


def moved(tx: Any, opt_state: Any, params: Any, moves: Moves) -> Any:
    """Return an optimizer's state in which all that it holds of some weights has followed them.

    Args:
      tx: The optimizer.
      opt_state: Its state, of `params`.
      params: Parameters before the change.
      moves: What becomes of a leaf, by path of the weight.
    """
    whose = owners(tx, opt_state, params, moves)
    leaves, structure = jax.tree.flatten(opt_state)
    new = [leaf if name is None else moves[name](leaf) for leaf, name in zip(leaves, whose, strict=True)]
    return jax.tree.unflatten(structure, new)


def check_like_new(tx: Any, opt_state: Any, params: Any) -> None:
    """Raise unless a state has the structure and the shapes of a new one, of parameters of a new stage.

    Raises:
      ValueError: It has not: the optimizer treats a weight by its shape, and takes a sparse one for another kind.
    """
    expected = jax.eval_shape(tx.init, params)
    named = lambda tree: {
        path_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    got, wanted = named(opt_state), named(expected)
    if _structure(opt_state) == _structure(expected) and got == wanted:
        return
    different = [name for name in {**wanted, **got} if got.get(name) != wanted.get(name)]
    where = ", ".join(different[:3]) or "its root"
    raise ValueError(
        f"Of sparse weights this optimizer has another state than of dense ones, at {where}: "
        "it treats parameters by their shape, as Adafactor and Muon do, so that moments cannot follow. Take one that "
        "does not, or begin it anew at the stage: variables, _, state = schedule.update(optax.identity(), variables, "
        "optax.identity().init(None), state), and then tx.init(variables['params'])."
    )


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
