"""`prune` and `densify`: variables with sparse weights, and back."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from msbp_jax import _compat
from msbp_jax._checks import path_name
from msbp_jax.weights import _choose
from msbp_jax.weights._pattern import Pattern, check_pattern, gathered, pattern_of
from msbp_jax.weights._sparse_weight import SparseWeight, is_sparse, with_patterns

SPARSITY = "sparsity"


def prune(
    variables: Mapping[str, Any],
    *,
    density: float | None = None,
    method: Literal["magnitude", "random"] = "magnitude",
    scope: Literal["layer", "global", "erdos_renyi"] = "layer",
    masks: Any = None,
    include: Sequence[str] | None = None,
    input_axes: Mapping[str, int] | None = None,
    stacked: Sequence[str] = (),
    block: tuple[int, int] | None = None,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Return variables whose weights are sparse: a leaf of values each, and its pattern in a collection of its own.

        {"params": {"Dense_0": {"kernel": [784, 1024]}}}   ->
        {"params": {"Dense_0": {"kernel": [entries]}}, "sparsity": {"Dense_0": {"kernel": Pattern}}}

    Args:
      variables: A model's variables, with "params"; other collections stay as they are. `{"params": params}` for a
        function.
      density: Share of the entries that is kept, of each weight or of all together.
      method: `"magnitude"`, the largest, ties to the first; `"random"`, drawn alike.
      scope: `"layer"`: so many of each weight. `"global"`: the largest of all weights. `"erdos_renyi"`: more of small
        weights, in proportion to `(m + n) / (m n)`.
      masks: In place of a density: a pytree like the parameters, or a part of one, with masks of booleans (or of 0 and
        1, as JaxPruner has them) in the shape of the weight; None, or a mask of ones, leaves a weight dense.
      include: Patterns of paths, such as `"Dense_*/kernel"`; by default every kernel of two axes, and those that
        `stacked` or `input_axes` name.
      input_axes: For weights of more than two axes, by pattern of their path: how many axes, from the first on, are
        contracted with the input, 1 if not given.
      stacked: Patterns of paths of weights whose first axis is of layers that a scan runs through. Each has a pattern
        of its own.
      block: `(16, 16)`, for example: keep whole blocks of so many inputs and features, by their norms. On a GPU or TPU
        these are small dense products, where entries anywhere gain nothing.
      key: Typed PRNG key of `method="random"`.

    Returns:
      New variables. What is differentiated is `"params"`; pass `"sparsity"` along, as `batch_stats` are. A leaf of
      values has one axis, whatever a mask of weight decay or an optimizer makes of that.

    Raises:
      TypeError: A weight that is not an array of floats, or a mask of another kind.
      ValueError: Nothing is kept of a weight, a mask of another shape, a pattern that matches nothing, variables that
        are sparse already, or a weight that is not finite.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> variables = {"params": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.zeros(4)}}
      >>> sparse = msbp.prune(variables, density=0.25)
      >>> sparse["params"]["kernel"].tolist(), sparse["sparsity"]["kernel"].shape
      ([9.0, 10.0, 11.0], (3, 4))

    References:
      Nikdan et al., SparseProp, 2023 (arXiv 2302.04852). Mocanu et al., Scalable training of artificial neural networks
      with adaptive sparse connectivity, 2018 (arXiv 1707.04780), for `"erdos_renyi"`.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError('prune takes variables with a collection "params"; of a function, {"params": params}.')
    if jax.tree.leaves(variables.get(SPARSITY, {})):
        raise ValueError("These variables are sparse already. Prune what msbp.densify makes of them.")
    if (density is None) == (masks is None):
        raise ValueError("prune takes one of density= and masks=.")
    if block is not None:
        _checked(block)
    if masks is not None and (method, scope, include, key) != ("magnitude", "layer", None, None):
        raise ValueError("Masks say all: with masks= there is no method=, scope=, include= or key=.")
    keyed, structure = jax.tree_util.tree_flatten_with_path(variables["params"])
    _check_names([path_name(path) for path, _ in keyed])
    leaves = {path_name(path): leaf for path, leaf in keyed}
    axes = {name: _of_pattern(name, input_axes or {}) for name in leaves}
    layers = {name: int(any(fnmatch.fnmatchcase(name, pattern) for pattern in stacked)) for name in leaves}
    _check_matches("include", include or (), leaves)
    _check_matches("input_axes", input_axes or (), leaves)
    _check_matches("stacked", stacked, leaves)
    if masks is not None:
        kept = _given(masks, leaves)
    else:
        share = _choose.check_choice(density, method, scope, key)
        names = [name for name, leaf in leaves.items() if _chosen(name, leaf, include, axes[name], layers[name])]
        if not names:
            raise ValueError(f"There is no weight to prune among {', '.join(leaves)}. Name some by include=.")
        weights = {name: _as_matrices(name, leaves[name], axes[name] or 1, layers[name]) for name in names}
        cut = weights if block is None else _choose.in_blocks(weights, block)
        kept = _masks(cut, share, method, scope, key)
        kept = kept if block is None else _choose.of_blocks(kept, block)
        kept = {name: mask.reshape(np.shape(leaves[name])) for name, mask in kept.items()}
    patterns, values = {}, dict(leaves)
    for name, mask in kept.items():
        try:
            pattern = pattern_of(mask, input_axes=axes[name] or 1, stacked=layers[name], block=block)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        patterns[name] = pattern
        values[name] = gathered(pattern, jax.numpy.asarray(leaves[name]))
    params = jax.tree.unflatten(structure, [values[path_name(path)] for path, _ in keyed])
    return {**variables, "params": params, SPARSITY: _nested([path for path, _ in keyed], patterns)}


def densify(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return variables with dense weights: those that `prune` took, with zeros for what it left out.

    Args:
      variables: With "params" and "sparsity"; gradients in place of the parameters will do.

    Returns:
      The same without "sparsity".

    Raises:
      ValueError: A pattern is of no parameter or of another one, or its numbers contradict each other.

    Example:
      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> variables = {"params": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
      >>> msbp.densify(msbp.prune(variables, density=0.5))["params"]["kernel"].tolist()
      [[0.0, 0.0], [3.0, 4.0]]

    References:
      Nikdan et al., SparseProp, 2023 (arXiv 2302.04852).
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError('densify takes variables with collections "params" and "sparsity", as prune returns them.')
    merged = with_patterns(variables["params"], variables.get(SPARSITY, {}))
    for path, node in jax.tree_util.tree_flatten_with_path(merged, is_leaf=is_sparse)[0]:
        traced = any(isinstance(leaf, _compat.Tracer) for leaf in jax.tree.leaves(node))
        if isinstance(node, SparseWeight) and not traced:
            check_pattern(node.pattern, path_name(path))
    dense = jax.tree.map(lambda node: node.dense() if is_sparse(node) else node, merged, is_leaf=is_sparse)
    rest = {name: tree for name, tree in variables.items() if name != SPARSITY}
    return {**rest, "params": dense}


def _checked(block: Any) -> tuple[int, int]:
    if not isinstance(block, tuple) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"block must be (inputs, features), two positive whole numbers, or None, got {block!r}.")
    return block


def _masks(
    weights: dict[str, np.ndarray], density: float, method: str, scope: str, key: jax.Array | None
) -> dict[str, np.ndarray]:
    if scope == "global":
        return _choose.largest_of_all(weights, density)
    shapes = {name: (weight.shape[0], weight.shape[1], weight.shape[2]) for name, weight in weights.items()}
    kept = _choose.counts(shapes, density, scope)
    if nothing := [name for name, count in kept.items() if count < 1]:
        raise ValueError(
            f"At density {density:g} nothing is kept of {', '.join(nothing)}. Give a larger density, or leave such a "
            "weight out by include=."
        )
    if method == "random":
        assert key is not None
        return _choose.drawn(weights, kept, key)
    return _choose.largest(weights, kept)


def _chosen(name: str, leaf: Any, include: Sequence[str] | None, axes: int | None, layers: int) -> bool:
    if include is not None:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
    least = 2 + layers if axes is not None or layers else np.ndim(leaf)
    return (
        name.split("/")[-1] in ("kernel", "params")
        and np.ndim(leaf) >= max(2, least)
        and (axes is not None or np.ndim(leaf) == 2 + layers)
    )


def _as_matrices(name: str, leaf: Any, axes: int, layers: int) -> np.ndarray:
    """Return a weight as `[layers, m, n]`, float32 or float64."""
    if isinstance(leaf, _compat.Tracer):
        raise TypeError(f"{name} is traced: which entries are kept is decided outside of jit.")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"{name} is a shape without numbers: which entries are kept is decided by them.")
    if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) or np.ndim(leaf) - layers < 2:
        raise TypeError(f"{name} is no weight to prune: expected floats with an input and an output axis.")
    shape = np.shape(leaf)[layers:]
    array = np.asarray(leaf, np.float64 if leaf.dtype == np.float64 else np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has entries that are not finite, of which none is larger than another.")
    return array.reshape(-1, math.prod(shape[:axes]), math.prod(shape[axes:]))


def _given(masks: Any, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return masks by path, those that leave something out."""
    found = {}
    for path, mask in jax.tree_util.tree_flatten_with_path(masks)[0]:
        name, array = path_name(path), np.asarray(mask)
        if name not in leaves:
            raise ValueError(f"There is a mask of {name}, and the parameters are {', '.join(leaves)}.")
        if isinstance(leaves[name], jax.ShapeDtypeStruct | _compat.Tracer):
            raise TypeError(f"{name} is a shape without numbers: values are taken from them.")
        if array.shape != np.shape(leaves[name]):
            raise ValueError(f"The mask of {name} has shape {array.shape}, and the weight {np.shape(leaves[name])}.")
        if array.dtype != bool and not np.isin(array, (0, 1)).all():
            raise TypeError(f"The mask of {name} must be of booleans, or of 0 and 1, True or 1 where it is kept.")
        if not array.all():
            found[name] = array.astype(bool)
    return found


def _of_pattern(name: str, by_pattern: Mapping[str, int]) -> int | None:
    return next((axes for pattern, axes in by_pattern.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _check_names(names: Sequence[str]) -> None:
    """Raise unless every parameter has a name of its own, which is in no other's way."""
    for name in names:
        if names.count(name) > 1 or any(other.startswith(f"{name}/") for other in names):
            raise ValueError(f"The name {name} is of two parameters, or of one and of a group of others. Rename one.")


def _check_matches(argument: str, patterns: Any, leaves: Mapping[str, Any]) -> None:
    if isinstance(patterns, str):
        raise TypeError(f"{argument} takes a list of patterns, got the string {patterns!r}. Write [{patterns!r}].")
    if isinstance(patterns, Mapping) and (bad := [n for n in patterns.values() if type(n) is not int or n < 1]):
        raise ValueError(f"{argument} takes how many axes are the input's, 1 or more, by pattern; got {bad[0]!r}.")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in leaves):
            raise ValueError(f"{argument}: {pattern!r} matches none of the parameters {', '.join(leaves)}.")


def _nested(paths: Sequence[tuple[Any, ...]], patterns: Mapping[str, Pattern]) -> Any:
    """Return the patterns as dicts, nested as the parameters are."""
    tree: dict[str, Any] = {}
    for path in paths:
        pattern = patterns.get(path_name(path))
        if pattern is None:
            continue
        node = tree
        *above, last = path_name(path).split("/")
        for name in above:
            node = node.setdefault(name, {})
        node[last] = pattern
    return tree
