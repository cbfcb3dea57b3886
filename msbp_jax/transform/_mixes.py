"""Which sites get a gradient without zero rows, whatever rows enter, because a norm over the batch mixes them.

One walk over the program knows of every array on which axis its rows are, one for each example. A sum over that axis
that is combined with rows again (a mean, a variance of batch norm) hands every row's gradient to all rows: for what it
was made from, nothing can be skipped. Sums over other axes (layer norm, softmax of attention, pooling) leave rows
apart, as does a loss. Where the axis is lost on the way, nothing is claimed.

The same walk tells which gradients sum to 0 over the rows, as `_shifts` says, so that the mean of them is nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.transform._discover import Place
from msbp_jax.transform._program import Program
from msbp_jax.transform._row_axes import LOST, NO_AXIS, joined, moved, reduces, summed_axes
from msbp_jax.transform._shifts import VALUE, Marks, joined_marks, marked
from msbp_jax.transform._sites import Site


@dataclasses.dataclass(frozen=True, slots=True)
class _Array:
    """What is known of an array.

    Attributes:
      axis: Where its rows are.
      by_row: Sites whose results it was made from row by row.
      in_sums: Sites whose results it has a sum of, over all rows.
      mixed: Sites that get their gradient through such a sum and rows that it was combined with.
      shifts: How it changes with the mean of a site's result.
      of_sites: Whether any site's result touched it, be it only by a comparison.
    """

    axis: int = NO_AXIS
    by_row: frozenset[str] = frozenset()
    in_sums: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()
    shifts: Marks = frozenset()
    of_sites: bool = False

    def without_gradient(self) -> _Array:
        return _Array(axis=self.axis, of_sites=self.of_sites)

    def __or__(self, other: _Array) -> _Array:
        return _Array(
            axis=joined((self.axis, other.axis)),
            by_row=self.by_row | other.by_row,
            in_sums=self.in_sums | other.in_sums,
            mixed=self.mixed | other.mixed,
            shifts=joined_marks(self.shifts, other.shifts),
            of_sites=self.of_sites or other.of_sites,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Mixing:
    """What norms over the batch do to gradients.

    Attributes:
      mixed: The names of the sites whose gradient has no zero rows.
      centred: Of those whose gradient sums to 0 over the rows, feature by feature.
    """

    mixed: frozenset[str]
    centred: frozenset[str]


def find_mixing(program: Program) -> Mixing:
    """Return what norms over the batch do to the gradients of a program's sites.

    Args:
      program: The program; its arguments may be shapes.
    """
    told = [_mixing_of(program, rows) for rows in _row_counts(program)]
    mixed: frozenset[str] = frozenset().union(*(one.mixed for one in told))
    shifted = {name for one in told for name in one.mixed - one.centred}
    return Mixing(mixed, mixed - shifted)


def _mixing_of(program: Program, rows: int) -> Mixing:
    """Return what norms over so many rows do: those of the arguments that have as many."""
    states = len(program.parameters) + program.states
    arguments = [
        _Array(axis=0 if number >= states and _compat.shape_of(var).shape[:1] == (rows,) else NO_AXIS)
        for number, var in enumerate(program.jaxpr.jaxpr.invars)
    ]
    walk = _Walk(rows, program.sites)
    results = walk.jaxpr(program.jaxpr, arguments, ())
    outputs = [result for result, is_output in zip(results, program.is_output, strict=True) if is_output]
    mixed: frozenset[str] = frozenset().union(*(output.mixed for output in outputs))
    shifted = {name for output in outputs for name, _ in output.shifts}
    return Mixing(mixed, mixed - shifted)


def _row_counts(program: Program) -> list[int]:
    """Return how many rows enter; several where arguments differ, none where that is unknown, or one alone.

    They are those of the arguments that some output has as well. No output need have them: a loss, a flattened result
    or a mean of features has others. But an output as long as another axis of an argument may have its rows there.
    """
    outputs = [aval for aval, yes in zip(program.jaxpr.out_avals, program.is_output, strict=True) if yes]
    data = [aval.shape for aval in program.jaxpr.in_avals[len(program.parameters) + program.states :] if aval.shape]
    known = lambda size: not _compat.is_symbolic(size) and size > 1
    sizes = list(dict.fromkeys(shape[0] for shape in data if known(shape[0])))
    others = {size for shape in data for size in shape[1:] if known(size)}
    leading = {aval.shape[0] for aval in outputs if aval.shape and known(aval.shape[0])}
    return [size for size in sizes if size in leading] or ([] if leading & others else sizes)


class _Walk:
    def __init__(self, rows: int, sites: Sequence[Site]) -> None:
        self.rows = rows
        self.names = {site.found.place: site.name for site in sites}
        self.features = {site.name: site.dims.n * math.prod(site.dims.batch_shape) for site in sites}

    def jaxpr(self, jaxpr: _compat.ClosedJaxpr, arguments: Sequence[_Array], place: Place) -> list[_Array]:
        known: dict[_compat.Var, _Array] = dict.fromkeys(jaxpr.jaxpr.constvars, _Array())
        known.update(zip(jaxpr.jaxpr.invars, arguments, strict=True))
        read = lambda atom: _Array() if isinstance(atom, _compat.Literal) else known[atom]
        for number, eqn in enumerate(jaxpr.jaxpr.eqns):
            results = self.equation(eqn, [read(atom) for atom in eqn.invars], (*place, number))
            for var, result in zip(eqn.outvars, results, strict=True):
                has_gradient = jnp.issubdtype(_compat.shape_of(var).dtype, jnp.inexact)
                known[var] = result if has_gradient else result.without_gradient()
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def equation(self, eqn: _compat.JaxprEqn, inputs: list[_Array], place: Place) -> list[_Array]:
        match eqn.primitive:
            case _compat.scan_p:
                return self._scan(eqn, inputs, place)
            case _compat.cond_p:
                branches = [
                    self.jaxpr(_compat.closed(branch), inputs[1:], (*place, number))
                    for number, branch in enumerate(eqn.params["branches"])
                ]
                return [functools.reduce(_Array.__or__, results) for results in zip(*branches, strict=True)]
            case _compat.jit_p | _compat.remat_p | _compat.closed_call_p:
                key = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
                return self.jaxpr(_compat.closed(eqn.params[key]), inputs, place)
        if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            bodies = [_compat.closed(body) for body in _compat.jaxprs_in_params(eqn.params)]
            if bodies and len(bodies[0].jaxpr.invars) == len(inputs):
                return self.jaxpr(bodies[0], inputs, (*place, 0))
        return [self._plain(eqn, number, inputs, place) for number in range(len(eqn.outvars))]

    def _plain(self, eqn: _compat.JaxprEqn, number: int, inputs: list[_Array], place: Place) -> _Array:
        """Return what is known of one result of an equation without a body."""
        if eqn.primitive.name == "stop_gradient":
            return inputs[0].without_gradient()
        found = functools.reduce(_Array.__or__, inputs, _Array())
        axis = moved(eqn, number, [array.axis for array in inputs], self.rows)
        summed = summed_axes(eqn)
        sums_rows = any(array.axis in axes for array, axes in zip(inputs, summed, strict=True)) if summed else False
        if eqn.primitive.name == "select_n" and inputs[0].axis not in (NO_AXIS, LOST) and not inputs[0].of_sites:
            # Masked rows may have no part in a later sum, and stay 0.
            found = dataclasses.replace(found, by_row=frozenset(), in_sums=frozenset())
        if sums_rows:
            axis, found = NO_AXIS, dataclasses.replace(found, by_row=frozenset(), in_sums=found.by_row | found.in_sums)
        elif inputs and reduces(eqn, inputs[0].axis):  # the gradient goes to a few rows
            axis, found = NO_AXIS, dataclasses.replace(found, by_row=frozenset())
        elif axis not in (NO_AXIS, LOST) and found.in_sums:
            found = dataclasses.replace(found, in_sums=frozenset(), mixed=found.mixed | found.in_sums)
        shifts = marked(eqn, [array.shifts for array in inputs], sums_rows=sums_rows, features=self.features)
        if (name := self.names.get(place)) is not None:
            rows_of = found.by_row if axis in (NO_AXIS, LOST) else found.by_row | {name}  # its result may have none
            found = dataclasses.replace(found, by_row=rows_of, of_sites=True)
            shifts |= {(name, VALUE)}
        return dataclasses.replace(found, axis=axis, shifts=shifts)

    def _scan(self, eqn: _compat.JaxprEqn, inputs: list[_Array], place: Place) -> list[_Array]:
        consts, carries = _compat.scan_arity(eqn.params)
        body = _compat.closed(eqn.params["jaxpr"])
        sliced = [dataclasses.replace(x, axis=_shifted(x.axis, -1)) for x in inputs[consts + carries :]]
        carry = inputs[consts : consts + carries]
        while True:
            results = self.jaxpr(body, [*inputs[:consts], *carry, *sliced], place)
            grown = [old | new for old, new in zip(carry, results[:carries], strict=True)]
            if grown == carry:
                stacked = [dataclasses.replace(y, axis=_shifted(y.axis, 1)) for y in results[carries:]]
                return [*carry, *stacked]
            carry = grown


def _shifted(axis: int, by: int) -> int:
    """Return the axis with a leading one more or less; a scan over the rows themselves loses them."""
    return axis if axis in (NO_AXIS, LOST) else axis + by if axis + by >= 0 else LOST
