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
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from msbp_jax.rules import Dims, Operation, Side, operation_of
from msbp_jax.sparsifiers import Sparsifier
from msbp_jax.sparsifiers._base import serving
from msbp_jax.sparsifiers._where import Stays, Where, abstract_norms
from msbp_jax.transform._discover import Found, Loop
from msbp_jax.transform._plan import Plan
from msbp_jax.transform._remembers import Remembers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site(Remembers):
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
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no rows, or nothing that they are made from."""
        return 0 in (self.repeats, self.dims.rows, self.dims.m, self.dims.n)


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
    serves = (
        None if sparsifier is None else _serving(sparsifier, _where(found, operation, dims, plan, explicit, backend))
    )
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


def _where(
    found: Found, operation: Operation | None, dims: Dims, plan: Plan, explicit: bool, backend: str | None
) -> Where:
    how = None if operation is None else operation.examples(found.lhs.shape, found.rhs.shape, found.out.dtype, backend)
    return Where(
        rows=dims.rows,
        n=dims.n,
        m=dims.m,
        dtype=found.out.dtype,
        rows_per_example=dims.rows_per_example,
        on_devices=any(loop.mesh_axis for loop in found.loops),
        min_features=0 if explicit else plan.min_features,
        backend=backend,
        native_examples=how is not None and how.products is not None,
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
