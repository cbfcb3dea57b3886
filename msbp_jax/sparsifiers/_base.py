r"""The contract of a sparsifier: two pure functions, as in Optax.

    init(aval)            -> state           aval: ShapeDtypeStruct of the cotangent, [rows, n]; never an array
    apply(u, state)       -> p, state        u: [rows, n]; p: a compact format of `msbp_jax.formats`

Rules that hold for every one of them:

* `apply` is traced under jit, vmap and scan: shapes depend on `u.shape` only, randomness comes from a key in the state
  and leaves a new key there; nothing is drawn from elsewhere.
* The state that leaves has the structure, shapes and dtypes of the state that came in.
* Columns are distinct within a group. Ties go to the lower index. Masks are True = kept.
* `p` has the dtype of `u`.
* Rows are consecutive: all leading axes of the layer's output flattened in their order. There may be none.
* A row that is exactly 0 takes no part in anything: it adds to no score, norm, mean or count, and `p` is 0 there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from msbp_jax import _checks
from msbp_jax.formats import Format
from msbp_jax.sparsifiers._where import Stays, Where, keeps_all

type State = Any

EXAMPLE = "example"


class Weighted(NamedTuple):
    """What one use of a layer makes of a cotangent and a state.

    Attributes:
      p: What is propagated.
      total: Of the state's structure: new numbers times their weights; whatever is no number as it becomes.
      weight: Of the state's structure too, float32, each leaf of the rank of the state's and broadcast to it. The new
        state is the sum of the totals of all uses over the sum of their weights; where that is 0, the old one.
    """

    p: Format
    total: State
    weight: State


class Sparsifier(NamedTuple):
    r"""A pair of pure functions that says what of a cotangent is propagated: `p = S(u)`.

    Attributes:
      init: Takes the cotangent's `jax.ShapeDtypeStruct`, shape `[rows, n]`, and returns the state: a pytree of
        arrays, `()` for none. Leaves that are typed PRNG keys are made different for every site by the library.
      apply: Takes `u`, `[rows, n]`, and the state, and returns `(p, state)`, `p` being a `Format` such as `Columns`.
        What `wants` names is passed by these names.
      name: How the report calls it.
      at: None, or what this becomes at a site: takes a `Where` and returns the sparsifier that serves there, itself
        for example, or `Stays` with the reason why it is left dense: then it is evaluated as plain JAX, without rule
        or state. Without it, sites of fewer features than `min_features` are left dense.
      with_memory: None, or for an `S` without state the selection with a memory in one go, where there is a faster way
        than `u = g + m`, `S(u)` and `u - p` one after the other: takes `(g, m)`, m being `[n]` or `[rows, n]`, and
        returns `(p, left, rows)` as `msbp_jax.kernels.select_with_memory` does. `memorized` uses it.
      weighted: None, or `apply` for a state that a layer's several uses make together: takes what `apply` does and
        returns `Weighted`. Without it, each use weighs by its rows that are not 0.
      per_device: Whether, inside a `shard_map`, every device has a state of its own, though they share the weight.
      wants: What `apply` is to see besides, computed only for those who ask: `"input_norms"`, the Euclidean norm of
        what each row of the output is made from, `[rows]`; `"weight_norms"`, that of each feature's weights, `[n]`.
      enters: Whether, given for a whole model, it is applied once, where the gradient enters the model ("@outputs").
      remembers: Whether what it leaves out is worth a memory: not if it is unbiased by rows. `memorized` asks.

    Example:
      Keep the first `k` features, whatever they hold:

      >>> import jax.numpy as jnp, msbp_jax as msbp
      >>> def first(k):
      ...     def apply(u, state):
      ...         index = jnp.arange(k, dtype=jnp.int32)[None]
      ...         return msbp.take_columns(u, index, rows_per_group=None), state
      ...     return msbp.Sparsifier(init=lambda aval: (), apply=apply, name=f"first({k})")
      >>> msbp.testing.check_sparsifier(first(3))
    """

    init: Callable[[jax.ShapeDtypeStruct], State]
    apply: Callable[..., tuple[Format, State]]
    name: str = "custom"
    at: Callable[[Where], Sparsifier | Stays] | None = None
    with_memory: Callable[[jax.Array, jax.Array], tuple[Format, jax.Array, jax.Array]] | None = None
    weighted: Callable[..., Weighted] | None = None
    per_device: bool = False
    wants: tuple[str, ...] = ()
    enters: bool = False
    remembers: bool = True

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sparsifier) and _by_value(self) == _by_value(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(_by_value(self))


@functools.lru_cache(maxsize=256)
def keeps_state(sparsifier: Sparsifier) -> bool:
    """Whether a sparsifier has a state; one that cannot say without rows counts as having one."""
    try:
        state = jax.eval_shape(lambda: sparsifier.init(jax.ShapeDtypeStruct((0, 1024), "float32")))
    except Exception:
        return True
    return bool(jax.tree.leaves(state))


def serving(sparsifier: Sparsifier, where: Where) -> Sparsifier | Stays:
    """Return what serves at a site: the sparsifier's own answer; without one, itself unless the site is narrow."""
    if sparsifier.at is not None:
        return sparsifier.at(where)
    return Stays(where.too_narrow) if where.too_narrow else sparsifier


def _by_value(sparsifier: Sparsifier) -> tuple[Any, ...]:
    """Return the fields with methods taken apart: Python takes those of equal objects for different."""
    return tuple((f.__self__, f.__func__) if inspect.ismethod(f) else f for f in tuple(sparsifier))


class Count(NamedTuple):
    """How many columns to keep: a number, or a share of however many there are. Exactly one of them is set."""

    k: int | None
    density: float | None

    def of(self, n: int) -> int:
        """Return `min(n, k)`, or `max(1, round(density * n))`."""
        if self.k is not None:
            return min(n, self.k)
        assert self.density is not None
        return max(1, round(self.density * n))

    def why_not(self, name: str, where: Where) -> Stays | None:
        """Return why nothing is to be chosen at a site, None if something is."""
        if self.of(where.n) >= where.n:
            return keeps_all(name, where.n)
        return Stays(where.too_narrow) if where.too_narrow else None

    def __str__(self) -> str:
        return f"k={self.k}" if self.k is not None else f"density={self.density:g}"


def check_count(caller: str, density: float | None, k: int | None) -> Count:
    """Return the checked pair, exactly one of which must be given.

    Raises:
      ValueError: Both or neither are given, `k < 1`, or `density` outside (0, 1].
      TypeError: `k` is not an integer or `density` not a number.
    """
    if (density is None) == (k is None):
        got = "neither" if k is None else f"density={density!r} and k={k!r}"
        raise ValueError(
            f"{caller} takes either density= or k=, got {got}. "
            f"Write {caller}(density=0.04) for a share of the features or {caller}(k=20) for a number of them."
        )
    if k is not None:
        return Count(_checks.positive_int("k", k, "features kept in each group of rows"), None)
    return Count(None, _checks.fraction("density", density, zero=False, meaning="share of the features kept"))


type RowsPerGroup = int | Literal["example"] | None


def check_rows_per_group(rows_per_group: RowsPerGroup) -> RowsPerGroup:
    """Return a checked group size; None means that the whole batch shares one choice."""
    if rows_per_group is None or rows_per_group == EXAMPLE:
        return rows_per_group
    return _checks.positive_int(
        "rows_per_group",
        rows_per_group,
        'rows that share a choice; "example" for all rows of an example, None for one choice for the whole batch',
    )


def rows_of(rows_per_group: RowsPerGroup) -> int | None:
    """Return the group size where nothing is known of examples: then every row is one."""
    return 1 if isinstance(rows_per_group, str) else rows_per_group


def describe(name: str, count: Count, rows_per_group: RowsPerGroup) -> str:
    """Return the name that reports show."""
    group = f'"{rows_per_group}"' if isinstance(rows_per_group, str) else rows_per_group
    return f"{name}({count}, rows_per_group={group})"
