"""Sites: the contractions of a program with their names, their sparsifiers, and the memory they need.

A site is named by the path of the parameter that reaches it (`Dense_0/kernel`); a second use of the same parameter is
`...#2`. A contraction without a parameter is named after its primitive, `@dot_general_0`, `@dot_general_1`, ...: dense
unless the plan names it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._checks import is_array
from msbp_jax.carriers import plain
from msbp_jax.rules import Dims, Operation, Side, operation_of
from msbp_jax.sparsifiers import Sparsifier
from msbp_jax.sparsifiers._base import State, serving
from msbp_jax.sparsifiers._keys import fold_name, split_keys
from msbp_jax.sparsifiers._weighted import apply_weighted, averages
from msbp_jax.sparsifiers._where import Stays, Where, abstract_norms
from msbp_jax.transform._discover import Found, Loop
from msbp_jax.transform._plan import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A contraction under its name.

    Attributes:
      name: Path of its parameter.
      found: The contraction in the program.
      side: Which operand is the weight.
      operation: The contraction as a rule sees it; None if no rule takes it.
      dims: Its canonical sizes.
      loops: The scans and mesh axes around it, outermost first.
      sparsifier: Its sparsifier; None where it stays dense.
      reason: Why it stays dense ("" if it does not).
      dense_by_choice: Whether it does because the plan says so, or nothing of it.
    """

    name: str
    found: Found
    side: Side
    operation: Operation | None
    dims: Dims
    loops: tuple[Loop, ...]
    sparsifier: Sparsifier | None
    reason: str
    dense_by_choice: bool

    @property
    def cotangent(self) -> jax.ShapeDtypeStruct:
        """Shape `[rows, n]` and dtype of the gradient that the sparsifier sees."""
        return jax.ShapeDtypeStruct((self.dims.rows, self.dims.n), self.found.out.dtype)

    @property
    def instances(self) -> tuple[int, ...]:
        """Leading axes of the memory: layers stacked by scans, shards, then batch axes of the contraction."""
        stacked = tuple(loop.length for loop in self.loops if loop.instances)
        return (*stacked, self.dims.batch) if self.dims.batch_shape else stacked

    @property
    def repeats(self) -> int:
        """How often the contraction runs in a step, on all devices."""
        return math.prod(loop.length for loop in self.loops) * self.dims.batch

    @property
    def abstract_state(self) -> State:
        """Shapes and dtypes of the state."""
        assert self.sparsifier is not None
        state = _abstract_init(self.sparsifier, self.cotangent)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*self.instances, *leaf.shape), leaf.dtype), state)

    @property
    def weight_shapes(self) -> list[tuple[int, ...] | None]:
        """Shape of what each leaf of the state weighs in one use; None for leaves that are no numbers."""
        assert self.sparsifier is not None
        state, weight = _abstract_use(self.sparsifier, self.cotangent)
        return [
            (*self.instances, *leaf_weight.shape) if averages(leaf) else None
            for leaf, leaf_weight in zip(*map(jax.tree.leaves, (state, weight)), strict=True)
        ]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no rows, or nothing that they are made from."""
        return 0 in (self.repeats, self.dims.rows, self.dims.m, self.dims.n)

    def init(self, label: str) -> State:
        """Return the state at the start; PRNG keys in it differ by site, by instance, and by what was wrapped."""
        assert self.sparsifier is not None

        def spread(leaf: Any) -> jax.Array:
            leaf = jnp.asarray(leaf)
            if not _compat.is_key(leaf):
                return jnp.broadcast_to(leaf, (*self.instances, *leaf.shape))
            keys = split_keys(fold_name(leaf, f"{label}/{self.name}"), math.prod(self.instances))
            return keys.reshape(*self.instances, *leaf.shape)

        return jax.tree.map(spread, self.sparsifier.init(self.cotangent))


@functools.lru_cache(maxsize=1024)  # every call of a wrapped model checks its memory
def _abstract_init(sparsifier: Sparsifier, cotangent: jax.ShapeDtypeStruct) -> State:
    return jax.eval_shape(lambda: sparsifier.init(cotangent))


@functools.lru_cache(maxsize=1024)
def _abstract_use(sparsifier: Sparsifier, cotangent: jax.ShapeDtypeStruct) -> tuple[State, State]:
    """Return the state and what it weighs, in shapes."""
    state = _abstract_init(sparsifier, cotangent)
    seen = abstract_norms(sparsifier.wants, cotangent)
    use = lambda g, state, seen: apply_weighted(sparsifier, g, state, **seen).weight
    return state, jax.eval_shape(use, cotangent, state, seen)


def name_sites(
    found: Sequence[Found], parameters: Sequence[tuple[str, int]], plan: Plan, backend: str | None
) -> list[Site]:
    """Return the sites of a program.

    Args:
      found: Its contractions, in the program's order.
      parameters: Path and size of each parameter leaf.
      plan: Which sparsifier each site gets.
      backend: Which backend was asked for; None to choose.
    """
    uses: collections.Counter[str] = collections.Counter()
    names = {}
    # Those that are left alone are named last: a branch for another platform must not take the name of one that runs.
    for contraction in sorted(found, key=lambda contraction: bool(contraction.sealed)):
        name = _name(contraction, parameters)
        uses[name] += 1
        if name.startswith("@"):
            name = f"{name}_{uses[name] - 1}"
        elif uses[name] > 1:
            name = f"{name}#{uses[name]}"
        names[contraction.place] = name
    return [_site(names[contraction.place], contraction, plan, backend) for contraction in found]


def init_memory(sites: Sequence[Site], label: str) -> dict[str, State]:
    """Return the memory of all sparse sites at the start; `label` tells one model's keys from another's."""
    return {site.name: site.init(label) for site in sites if site.sparsifier is not None}


def check_memory(memory: Any, sites: Sequence[Site], parameters: Sequence[str] = ()) -> None:
    """Raise unless `memory` is of these sites; the paths of the parameters tell whether it is they that were passed.

    Raises:
      TypeError: It is not a mapping.
      ValueError: Sites are missing, or a site's state has another structure or other shapes. It may have more sites: a
        call that does not reach them leaves them as they are.
    """
    if not isinstance(memory, Mapping):
        raise TypeError(
            f"memory must be what init_memory returned, a mapping by site name, got {type(memory).__name__}."
        )
    sparse = {site.name: site for site in sites if site.sparsifier is not None}
    if missing := sorted(sparse.keys() - memory.keys()):
        swapped = set(map(str, memory)) & {path.split("/")[0] for path in parameters} - sparse.keys()
        raise ValueError(
            f"memory is not of this model and plan: it lacks the sites {missing}, and has "
            f"{sorted(map(str, memory)) or 'none'}. "
            + ("These are parameters: were params and memory swapped? " if swapped else "")
            + "Make it with init_memory of the same wrapped model, from a call that reaches all that is trained."
        )
    wanted, given = {name: site.abstract_state for name, site in sparse.items()}, plain(dict(memory))
    if what := _taken_for_states(wanted, given):
        raise ValueError(what)
    differences = [
        line
        for name, site in sparse.items()
        if not site.is_empty  # without rows, a memory by row may have any number of them
        for line in _differences(name, wanted[name], given[name])
    ]
    if differences:
        raise ValueError(
            "\n  ".join(["memory is of other shapes than this model, plan and batch:", *differences])
            + '\nIt comes from another model or plan or, with reduce="slot" or "local", from another batch size or '
            "number of devices: make it with init_memory of the same wrapped model and arguments of these shapes."
        )


def _taken_for_states(wanted: Mapping[str, State], given: Mapping[str, Any]) -> str:
    """Say what was passed instead of states of sparsifiers, where that can be seen; else ""."""
    states = {name: state for name, state in wanted.items() if hasattr(state, "_fields")}
    restored = [n for n, s in states.items() if isinstance(given[n], Mapping) and set(given[n]) == set(s._fields)]
    if restored:
        kind = type(states[restored[0]]).__name__
        return (
            f"memory of {', '.join(restored)} is a dict of the fields of {kind}, as a checkpoint is that was restored "
            "without a target. Restore it with one, as ocp.args.StandardRestore(model.init_memory(...)) does."
        )
    if arrays := [name for name in states if is_array(given[name])]:
        return (
            f"memory of {', '.join(arrays)} is an array, and no state of a sparsifier. Were params and memory swapped? "
            "The memory is what init_memory of the wrapped model returned."
        )
    return ""


def _differences(name: str, wanted: State, given: State) -> list[str]:
    """Say what differs between the state that a site needs and the one that it is given, a line each."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (wanted, given)]
    if structures[0] != structures[1]:
        return [f"memory of site {name} has another structure: expected {structures[0]}, got {structures[1]}."]
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True)
    return [
        f"memory of site {name} has shape {getattr(have, 'shape', None)} and dtype {getattr(have, 'dtype', None)}, "
        f"expected {want.shape} and {want.dtype}."
        for want, have in pairs
        if (want.shape, want.dtype) != (getattr(have, "shape", None), getattr(have, "dtype", None))
    ]


def _name(found: Found, parameters: Sequence[tuple[str, int]]) -> str:
    if found.side is None:
        return f"@{found.primitive}"
    source = found.lhs_source if found.side == "lhs" else found.rhs_source
    # A weight made from several leaves (a low-rank update, a scale) is named after the largest.
    return min((-parameters[leaf][1], leaf, parameters[leaf][0]) for leaf in source.parameters)[2]


def _site(name: str, found: Found, plan: Plan, backend: str | None) -> Site:
    side: Side = found.side or "rhs"
    operation, dims, reason = _operation(found, side)
    reason = _why_no_gradient(found) or found.sealed or reason
    sparsifier, explicit = plan.match(name)
    serves = None if sparsifier is None else _serving(sparsifier, _where(found, dims, plan, explicit, backend))
    stays = Stays(reason) if reason else Stays(*_unnamed(found)) if serves is None else serves
    loops = found.loops
    if isinstance(stays, Sparsifier) and stays.per_device:
        loops = tuple(dataclasses.replace(loop, instances=loop.instances or loop.sharded) for loop in loops)
    return Site(
        name=name,
        found=found,
        side=side,
        operation=operation,
        dims=dims,
        loops=loops,
        sparsifier=stays if isinstance(stays, Sparsifier) else None,
        reason=stays.reason if isinstance(stays, Stays) else "",
        dense_by_choice=isinstance(stays, Stays) and stays.by_choice,
    )


def _where(found: Found, dims: Dims, plan: Plan, explicit: bool, backend: str | None) -> Where:
    return Where(
        rows=dims.rows,
        n=dims.n,
        m=dims.m,
        dtype=found.out.dtype,
        rows_per_example=dims.rows_per_example,
        on_devices=any(loop.mesh_axis for loop in found.loops),
        min_features=0 if explicit else plan.min_features,
        backend=backend,
    )


def _why_no_gradient(found: Found) -> str:
    """Return why a contraction has no gradient that could be sparse, or ""."""
    dtype = found.out.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return f"its result is {dtype}: features are chosen by real magnitudes"
    return "" if jnp.issubdtype(dtype, jnp.floating) else f"its result is {dtype}, which has no gradient"


def _operation(found: Found, side: Side) -> tuple[Operation | None, Dims, str]:
    """Return a contraction's operation, sizes, and why no rule takes it ("" if one does)."""
    try:
        operation = operation_of(found.primitive, dict(found.params), side)
    except NotImplementedError as declined:
        n = found.out.shape[-1] if found.out.shape else 1
        return None, Dims((), found.out.size // max(1, n), 1, 0, n), str(declined)
    return operation, operation.dims(found.lhs.shape, found.rhs.shape, found.out.shape), ""


@functools.lru_cache(maxsize=1024)
def _serving(sparsifier: Sparsifier, where: Where) -> Sparsifier | Stays:
    serves = serving(sparsifier, where)
    if isinstance(serves, Sparsifier):
        abstract_norms(serves.wants, where.cotangent)  # raises if it wants something that does not exist
    return serves


def _unnamed(found: Found) -> tuple[str, bool]:
    """Return why a contraction that no pattern matches is dense, and whether that is what the plan asks for."""
    if found.side is not None:
        return "no pattern of the plan matches", True
    lhs, rhs = found.lhs_source, found.rhs_source
    if lhs.is_weight and rhs.is_weight:
        return "both operands are made from parameters alone (what a function closes over is no data: pass it)", False
    return "no operand is a parameter alone; a pattern that starts with @ can name it", False
