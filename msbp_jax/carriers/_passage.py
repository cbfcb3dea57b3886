"""How state leaves the backward pass: as the cotangent of arguments that are made for it.

Beside every leaf of a memory go its *carriers*: zeros of its shape, with respect to which the loss is differentiated
too. A use of a site gives them, as their cotangent, its new state and how much that counts. JAX's own transposition
then brings both back to where the leaf came from: through `vmap` over any axis, `scan`, `cond`, `shard_map`, slices
and stacks; it adds up what several uses give, and leaves zeros where nothing ran. So nothing needs to be known of the
loops around a site.

Inside the loss the leaf and its carriers are one `Marked`, which works as the leaf itself where it is read. A loss may
also compute with all leaves of a pytree that it is handed, the carriers among them, such as a sum of the memory. Hence
one more carrier, which is given nothing by any site: what it gets, its siblings got too, and it is taken off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._checks import path_name
from msbp_jax.carriers._leaf import Carriers, carriers_of, collected
from msbp_jax.carriers._marked import Aside, Marked, Witness, is_empty, is_mark, plain
from msbp_jax.carriers._observe import Observer
from msbp_jax.sparsifiers._base import State
from msbp_jax.sparsifiers._keys import fold, fold_name, split_keys


class Passage:
    """The passage of one memory through one differentiation.

    Args:
      memory: Any pytree of states. Marks of an outer differentiation are taken off.
      observer: Who looks at what the rules do; None in training.
      name: What tells its keys from those of other memories of the same loss.
    """

    def __init__(self, memory: Any, observer: Observer | None = None, name: str = "") -> None:
        for mark in filter(is_mark, jax.tree.leaves(memory, is_leaf=is_mark)):
            mark.aside.witness.taken_over = True
        self.memory = plain(memory)
        keyed, self._structure = jax.tree_util.tree_flatten_with_path(self.memory, is_leaf=is_empty)
        self._leaves = [leaf if is_empty(leaf) else jnp.asarray(leaf) for _, leaf in keyed]
        names = [f"{name}/{path_name(path)}" for path, _ in keyed]
        self._series = [_next_keys(*pair) for pair in zip(self._leaves, names, strict=True)]
        self._aside = Aside(observer, Witness())
        self.carriers: list[Carriers] = [
            () if is_empty(leaf) else (*carriers_of(leaf), _compat.zeros_placed_like(leaf, jnp.float32))
            for leaf in self._leaves
        ]

    @property
    def keys_now(self) -> Any:
        """The memory with the keys that the uses of this step draw with."""
        leaves = zip(self._leaves, self._series, strict=True)
        return jax.tree.unflatten(self._structure, [leaf if s is None else s[0] for leaf, s in leaves])

    @property
    def unused(self) -> bool:
        """Whether there was something to be used, and no wrapped model got it."""
        return any(not is_empty(leaf) for leaf in self._leaves) and not self._aside.witness.used

    @property
    def taken_over(self) -> bool:
        """Whether another differentiation, inside this one, took the memory."""
        return self._aside.witness.taken_over

    def marked(self, carriers: Sequence[Carriers]) -> Any:
        """Return the memory as the loss sees it. The carriers are `self.carriers`, as they are differentiated."""
        marks = [
            Marked(leaf if series is None else series[0], carriers_of_leaf, self._aside)
            for leaf, series, carriers_of_leaf in zip(self._leaves, self._series, carriers, strict=True)
        ]
        return jax.tree.unflatten(self._structure, marks)

    @staticmethod
    def of_sites(cotangents: Sequence[Carriers]) -> list[Carriers]:
        """Return what sites gave the carriers, of all that they got."""
        return [tuple(given - got[-1].astype(given.dtype) for given in got[:-1]) for got in cotangents]

    def collected(self, cotangents: Sequence[Carriers]) -> Any:
        """Return the new memory, from what sites gave the carriers."""
        new = [
            leaf if is_empty(leaf) else collected(leaf, None if series is None else series[1], given)
            for leaf, series, given in zip(self._leaves, self._series, cotangents, strict=True)
        ]
        return jax.tree.unflatten(self._structure, new)


def unwrap(name: str, state: State) -> tuple[State, list[Carriers] | None, Observer | None]:
    """Return a site's state without marks, its leaves' carriers (None where nothing is to return), and who observes.

    Raises:
      ValueError: Some of its leaves have carriers and others have not.
    """
    leaves, structure = jax.tree.flatten(state, is_leaf=is_mark)
    marks = [leaf for leaf in leaves if isinstance(leaf, Marked)]
    if not marks:
        return state, None, None
    if len(marks) < len(leaves):
        raise ValueError(
            f"The memory of site {name} was put together inside the loss from leaves of msbp.value_and_grad's "
            "memory and others, whose new values would not find their way back. Pass the state on as it came; change "
            "a memory outside of the loss."
        )
    for mark in marks:
        mark.aside.witness.used = True
    calls = marks[0].aside.witness.calls
    values = jax.tree.unflatten(structure, [_of_call(mark.value, calls[name]) for mark in marks])
    calls[name] += 1
    return values, [mark.carriers[:-1] for mark in marks if not is_empty(mark.value)], marks[0].aside.observer


def _of_call(leaf: Any, number: int) -> Any:
    """Return a leaf for the first, second, ... call with one memory in a loss: each draws with keys of its own."""
    return fold(leaf, number) if number and not is_empty(leaf) and _compat.is_key(leaf) else leaf


def _next_keys(leaf: Any, name: str) -> tuple[jax.Array, jax.Array] | None:
    """Return the keys that uses draw with in this step, and those that the next step starts from; None for no keys.

    The name of the leaf's place makes them differ between the memories of one loss, whatever they started from.
    """
    if is_empty(leaf) or not _compat.is_key(leaf):
        return None
    now, following = split_keys(fold_name(leaf, name), 2)
    return now, following
