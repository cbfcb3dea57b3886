"""A memory inside the loss: leaves that go with their carriers, and work as themselves where they are read."""

from __future__ import annotations

import collections
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from msbp_jax.carriers._leaf import Carriers
from msbp_jax.carriers._observe import Observer


class Witness:
    """Sees whether a memory came to a wrapped model, or went into a function compiled earlier, which may hold one.

    Attributes:
      used: Whether it did.
      taken_over: Whether another differentiation, inside this one, took it.
      calls: How often it came to a wrapped model, by site.
    """

    def __init__(self) -> None:
        self.used = False
        self.taken_over = False
        self.calls: collections.Counter[str] = collections.Counter()


class Aside:
    """What a mark carries besides arrays. For JAX's caches all are alike that observe nothing: steps compile once."""

    __slots__ = ("observer", "witness")

    def __init__(self, observer: Observer | None, witness: Witness) -> None:
        self.observer = observer
        self.witness = witness

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Aside) and self.observer is other.observer

    def __hash__(self) -> int:
        return hash(self.observer)


class Marked:
    """A leaf of a memory, or an empty state, with the carriers of its new value. Where it is read, it is the leaf.

    Attributes:
      value: The leaf; `()` for an empty state.
      carriers: Its carriers, and the one that is given nothing.
      aside: Who observes, and who sees that it is used.
    """

    __slots__ = ("aside", "carriers", "value")

    def __init__(self, value: Any, carriers: Carriers, aside: Aside) -> None:
        self.value = value
        self.carriers = carriers
        self.aside = aside

    @classmethod
    def tree(cls, memory: Any, carriers: Sequence[Carriers]) -> Any:
        """Return a memory with its leaves and empty states marked, where nobody watches whether it is used."""
        leaves, structure = jax.tree.flatten(memory, is_leaf=is_empty)
        aside = Aside(None, Witness())
        return jax.tree.unflatten(structure, [cls(*pair, aside) for pair in zip(leaves, carriers, strict=True)])

    def __jax_array__(self) -> jax.Array:
        return self.value

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self.value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Marked.__slots__:
            raise AttributeError(name)
        return getattr(self.value, name)

    def __repr__(self) -> str:
        return repr(self.value)


def _forward(name: str) -> Any:
    def method(self: Marked, *others: Any) -> Any:
        return getattr(operator, name)(self.value, *map(plain, others))

    return method


def _reflected(name: str) -> Any:
    def method(self: Marked, other: Any) -> Any:
        return getattr(operator, name)(plain(other), self.value)

    return method


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
for _name in _BINARY:
    setattr(Marked, f"__{_name}__", _forward(f"__{_name}__"))
    setattr(Marked, f"__r{_name}__", _reflected(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "getitem"):
    setattr(Marked, f"__{_name}__", _forward(f"__{_name}__"))
for _name, _function in {"len": len, "iter": iter, "bool": bool, "int": int, "float": float}.items():
    setattr(Marked, f"__{_name}__", lambda self, function=_function: function(self.value))
Marked.__hash__ = object.__hash__  # type: ignore[method-assign]


def _flatten(marked: Marked) -> tuple[tuple[Any, Carriers], Aside]:
    marked.aside.witness.used = True  # what it goes into may have been compiled with a wrapped model inside
    return (marked.value, marked.carriers), marked.aside


jax.tree_util.register_pytree_node(Marked, _flatten, lambda aside, children: Marked(*children, aside))


def plain(tree: Any) -> Any:
    """Return a pytree with every marked leaf as the leaf itself."""
    return jax.tree.map(lambda node: node.value if isinstance(node, Marked) else node, tree, is_leaf=is_mark)


def is_marked(tree: Any) -> bool:
    """Whether a pytree has marked leaves."""
    return any(isinstance(node, Marked) for node in jax.tree.leaves(tree, is_leaf=is_mark))


def is_empty(node: Any) -> bool:
    """Whether a node of a memory is the state of a sparsifier that has none."""
    return isinstance(node, tuple) and not node


def is_mark(node: Any) -> bool:
    """Whether a node is a marked leaf."""
    return isinstance(node, Marked)
