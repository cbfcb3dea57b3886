"""How state leaves the backward pass: as the cotangent of arguments that are made for it.

Beside every leaf of a memory go its *carriers*: zeros of its shape, with respect to which the loss is differentiated
too. A use of a site gives them, as their cotangent, its new state and how much that counts. JAX's own transposition
then brings both back to where the leaf came from: through `vmap` over any axis, `scan`, `cond`, `shard_map`, slices
and stacks; it adds up what several uses give, and leaves zeros where nothing ran. So nothing needs to be known of the
loops around a site.

    float      total, weight   the new value is their quotient; the old one where the weight is 0
    key        ran             the next of the key's own series if anything ran
    bool       total, ran      whether any use says True
    integer    digits          what uses add to it, in digits of 16 bits, which a float32 holds exactly

Inside the loss the leaf and its carriers are one `Marked`, which works as the leaf itself where it is read. A loss may
also compute with all leaves of a pytree that it is handed, the carriers among them, such as a sum of the memory. Hence
one more carrier, which is given nothing by any site: what it gets, its siblings got too, and it is taken off again.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax import _compat
from msbp_jax._checks import path_name
from msbp_jax.rules._observe import Observer
from msbp_jax.sparsifiers._base import State
from msbp_jax.sparsifiers._keys import fold, fold_name, select_keys, split_keys
from msbp_jax.sparsifiers._weighted import averages, quotient

type Carriers = tuple[jax.Array, ...]

_DIGIT_BITS = 16


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


class _Aside:
    """What a mark carries besides arrays. For JAX's caches all are alike that observe nothing: steps compile once."""

    __slots__ = ("observer", "witness")

    def __init__(self, observer: Observer | None, witness: Witness) -> None:
        self.observer = observer
        self.witness = witness

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Aside) and self.observer is other.observer

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

    def __init__(self, value: Any, carriers: Carriers, aside: _Aside) -> None:
        self.value = value
        self.carriers = carriers
        self.aside = aside

    @classmethod
    def tree(cls, memory: Any, carriers: Sequence[Carriers]) -> Any:
        """Return a memory with its leaves and empty states marked, where nobody watches whether it is used."""
        leaves, structure = jax.tree.flatten(memory, is_leaf=_is_empty)
        aside = _Aside(None, Witness())
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


def _flatten(marked: Marked) -> tuple[tuple[Any, Carriers], _Aside]:
    marked.aside.witness.used = True  # what it goes into may have been compiled with a wrapped model inside
    return (marked.value, marked.carriers), marked.aside


jax.tree_util.register_pytree_node(Marked, _flatten, lambda aside, children: Marked(*children, aside))


def plain(tree: Any) -> Any:
    """Return a pytree with every marked leaf as the leaf itself."""
    return jax.tree.map(lambda node: node.value if isinstance(node, Marked) else node, tree, is_leaf=_is_marked)


def is_marked(tree: Any) -> bool:
    """Whether a pytree has marked leaves."""
    return any(isinstance(node, Marked) for node in jax.tree.leaves(tree, is_leaf=_is_marked))


class Passage:
    """The passage of one memory through one differentiation.

    Args:
      memory: Any pytree of states. Marks of an outer differentiation are taken off.
      observer: Who looks at what the rules do; None in training.
      name: What tells its keys from those of other memories of the same loss.
    """

    def __init__(self, memory: Any, observer: Observer | None = None, name: str = "") -> None:
        for mark in filter(_is_marked, jax.tree.leaves(memory, is_leaf=_is_marked)):
            mark.aside.witness.taken_over = True
        self.memory = plain(memory)
        keyed, self._structure = jax.tree_util.tree_flatten_with_path(self.memory, is_leaf=_is_empty)
        self._leaves = [leaf if _is_empty(leaf) else jnp.asarray(leaf) for _, leaf in keyed]
        names = [f"{name}/{path_name(path)}" for path, _ in keyed]
        self._series = [_next_keys(*pair) for pair in zip(self._leaves, names, strict=True)]
        self._aside = _Aside(observer, Witness())
        self.carriers: list[Carriers] = [
            () if _is_empty(leaf) else (*_carriers(leaf), _compat.zeros_placed_like(leaf, jnp.float32))
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
        return any(not _is_empty(leaf) for leaf in self._leaves) and not self._aside.witness.used

    @property
    def taken_over(self) -> bool:
        """Whether another differentiation, inside this one, took the memory."""
        return self._aside.witness.taken_over

    def marked(self, carriers: Sequence[Carriers]) -> Any:
        """Return the memory as the loss sees it. The carriers are `self.carriers`, as they are differentiated."""
        marks = [
            Marked(leaf if series is None else series[0], own, self._aside)
            for leaf, series, own in zip(self._leaves, self._series, carriers, strict=True)
        ]
        return jax.tree.unflatten(self._structure, marks)

    @staticmethod
    def of_sites(cotangents: Sequence[Carriers]) -> list[Carriers]:
        """Return what sites gave the carriers, of all that they got."""
        return [tuple(one - own[-1].astype(one.dtype) for one in own[:-1]) for own in cotangents]

    def collected(self, cotangents: Sequence[Carriers]) -> Any:
        """Return the new memory, from what sites gave the carriers."""
        new = [
            leaf if _is_empty(leaf) else _collected(leaf, None if series is None else series[1], own)
            for leaf, series, own in zip(self._leaves, self._series, cotangents, strict=True)
        ]
        return jax.tree.unflatten(self._structure, new)


def unwrap(name: str, state: State) -> tuple[State, list[Carriers] | None, Observer | None]:
    """Return a site's state without marks, its leaves' carriers (None where nothing is to return), and who observes.

    Raises:
      ValueError: Some of its leaves have carriers and others have not.
    """
    leaves, structure = jax.tree.flatten(state, is_leaf=_is_marked)
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
    return values, [mark.carriers[:-1] for mark in marks if not _is_empty(mark.value)], marks[0].aside.observer


def _of_call(leaf: Any, number: int) -> Any:
    """Return a leaf for the first, second, ... call with one memory in a loss: each draws with keys of its own."""
    return fold(leaf, number) if number and not _is_empty(leaf) and _compat.is_key(leaf) else leaf


def narrowed(carriers: Carriers, weight: tuple[int, ...] | None) -> Carriers:
    """Return a leaf's carriers as a site gives them: a weight has one entry where it is the same along an axis.

    Args:
      carriers: As `unwrap` returns them.
      weight: Shape of the weight, for a leaf of numbers; None for others.
    """
    if weight is None:
        return carriers
    total, counts = carriers
    axes = tuple(axis for axis, (have, want) in enumerate(zip(counts.shape, weight, strict=True)) if want < have)
    return total, counts.sum(axis=axes, keepdims=True)


def given(old: jax.Array, total: jax.Array, weight: jax.Array) -> Carriers:
    """Return the cotangents of a leaf's carriers for one use.

    Args:
      old: The leaf.
      total: Its new value, times its weight if it holds numbers.
      weight: That weight.
    """
    if averages(old):
        return total.astype(_total_dtype(old)), weight.astype(jnp.float32)
    if _compat.is_key(old):
        return (jnp.ones(old.shape, jnp.float32),)
    if old.dtype == jnp.bool_:
        return total.astype(jnp.float32), jnp.ones(old.shape, jnp.float32)
    change = _widened(_as_unsigned(total) - _as_unsigned(old))
    mask = jnp.asarray(2**_DIGIT_BITS - 1, change.dtype)
    shifts = [jnp.asarray(_DIGIT_BITS * place, change.dtype) for place in range(_digits(old))]
    return tuple((jnp.right_shift(change, shift) & mask).astype(jnp.float32) for shift in shifts)


def _carriers(leaf: jax.Array) -> Carriers:
    def zeros(dtype: Any) -> jax.Array:
        return _compat.zeros_placed_like(leaf, dtype)

    if averages(leaf):
        return zeros(_total_dtype(leaf)), zeros(jnp.float32)
    if _compat.is_key(leaf):
        return (zeros(jnp.float32),)
    if leaf.dtype == jnp.bool_:
        return zeros(jnp.float32), zeros(jnp.float32)
    return tuple(zeros(jnp.float32) for _ in range(_digits(leaf)))


def _collected(old: jax.Array, series: jax.Array | None, cotangents: Carriers) -> jax.Array:
    if averages(old):
        return quotient(old, *cotangents)
    if series is not None:
        return select_keys(cotangents[0] > 0, series, old)
    if old.dtype == jnp.bool_:
        total, ran = cotangents
        return jnp.where(ran > 0, total > 0, old)
    unsigned = _as_unsigned(old)
    wide = _widened(unsigned).dtype
    digits = [
        (jnp.round(d).astype(wide) << jnp.asarray(_DIGIT_BITS * place, wide)) for place, d in enumerate(cotangents)
    ]
    change = sum(digits[1:], digits[0]).astype(unsigned.dtype)
    return jax.lax.bitcast_convert_type(unsigned + change, old.dtype)


def _next_keys(leaf: Any, name: str) -> tuple[jax.Array, jax.Array] | None:
    """Return the keys that uses draw with in this step, and those that the next step starts from; None for no keys.

    The name of the leaf's place makes them differ between the memories of one loss, whatever they started from.
    """
    if _is_empty(leaf) or not _compat.is_key(leaf):
        return None
    now, following = split_keys(fold_name(leaf, name), 2)
    return now, following


def _total_dtype(leaf: jax.Array) -> Any:
    wide = jnp.issubdtype(leaf.dtype, jnp.complexfloating) or leaf.dtype == jnp.float64
    return leaf.dtype if wide else jnp.float32


def _digits(leaf: jax.Array) -> int:
    return -(-8 * leaf.dtype.itemsize // _DIGIT_BITS)


def _as_unsigned(leaf: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))


def _widened(unsigned: jax.Array) -> jax.Array:
    return unsigned if unsigned.dtype.itemsize >= 4 else unsigned.astype(jnp.uint32)


def _is_marked(node: Any) -> bool:
    return isinstance(node, Marked)


def _is_empty(node: Any) -> bool:
    return isinstance(node, tuple) and not node
