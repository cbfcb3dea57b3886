"""Find every contraction of a program, and for each whether, and on which side, it has a parameter.

One walk over the jaxpr carries a `Source` for every variable through jit, scan, cond, remat, shard_map and the rest. A
contraction is named by its place: the indices of the equations that lead to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from msbp_jax import _compat, kernels
from msbp_jax.rules import CONTRACTIONS, Side
from msbp_jax.transform import _sources
from msbp_jax.transform._sources import CONSTANT, Source, union

Place = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A scan around a contraction, or an axis of the devices of a `shard_map` around it.

    Attributes:
      length: Its number of iterations, or devices.
      instances: True if the weight differs between them (stacked layers, shards of a weight: one memory each), False if
        it is the same one (time steps, shards of the batch: one memory).
      mesh_axis: Name of the devices' axis; "" for a scan.
      sharded: Whether either operand differs between the devices of that axis.
    """

    length: int
    instances: bool
    mesh_axis: str = ""
    sharded: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A contraction of the program.

    Attributes:
      place: Where in the program it stands.
      primitive: Name of its primitive.
      params: Parameters of its equation.
      lhs: Shape and dtype of the left operand, within its loops.
      rhs: Shape and dtype of the right operand.
      out: Shape and dtype of the result, hence of its gradient.
      lhs_source: What the left operand is made from.
      rhs_source: What the right operand is made from.
      loops: The scans and mesh axes around it, outermost first.
      sealed: Why it cannot be given a rule ("" if it can).
    """

    place: Place
    primitive: str
    params: dict[str, Any]
    lhs: jax.ShapeDtypeStruct
    rhs: jax.ShapeDtypeStruct
    out: jax.ShapeDtypeStruct
    lhs_source: Source
    rhs_source: Source
    loops: tuple[Loop, ...]
    sealed: str

    @property
    def side(self) -> Side | None:
        """Which operand is a weight; None if neither or both are."""
        if self.lhs_source.is_weight == self.rhs_source.is_weight:
            return None
        return "lhs" if self.lhs_source.is_weight else "rhs"

    @property
    def moves(self) -> bool:
        """Whether either operand may be differentiated."""
        return self.lhs_source.moves or self.rhs_source.moves


def discover(jaxpr: _compat.ClosedJaxpr, sources: Sequence[Source], constants: Sequence[Source]) -> list[Found]:
    """Return the contractions of a program in the order in which they stand in it.

    Args:
      jaxpr: The program.
      sources: What its arguments are.
      constants: What its constants are.
    """
    walk = _Walk()
    walk.jaxpr(jaxpr, sources, _At(), constants)
    return sorted(walk.found.values(), key=lambda found: found.place)


@dataclasses.dataclass(frozen=True, slots=True)
class _At:
    """Where the walk is.

    Attributes:
      place: The indices of the equations that lead there.
      loops: The loops around, outermost first, with their lengths.
      sealed: Why nothing there can be given a rule ("" if it can).
      typed: Whether types say what differs between the devices of the `shard_map` around.
    """

    place: Place = ()
    loops: tuple[tuple[_sources.LoopId, int], ...] = ()
    sealed: str = ""
    typed: bool = False

    def inside(self, number: int) -> _At:
        """Return the place of the equation or body of that number."""
        return dataclasses.replace(self, place=(*self.place, number))

    def within(self, *loops: tuple[_sources.LoopId, int]) -> _At:
        """Return the same place within further loops."""
        return dataclasses.replace(self, loops=(*self.loops, *loops))

    def sealed_by(self, reason: str) -> _At:
        """Return the same place in a body that cannot be given rules."""
        return dataclasses.replace(self, sealed=self.sealed or reason)

    def mesh_axes(self, names: Any) -> tuple[_sources.LoopId, ...]:
        """Return the axes of the devices around that have one of these names (or this name)."""
        wanted = set(names) if isinstance(names, (tuple, list, set, frozenset)) else {names}
        return tuple(loop for loop, _ in self.loops if loop[1] and loop[1] in wanted)


# Collectives whose result is the same on all devices of the axes that they name.
_MADE_ALIKE = frozenset({"psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"})


# Primitives that keep their own derivative. Any other with a body that is not known here is reported as unknown.
_OWN_DERIVATIVE = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "custom_linear_solve", "while"})


def _keeps_its_own(eqn: _compat.JaxprEqn) -> str:
    if eqn.primitive.name in _OWN_DERIVATIVE:
        return f"inside {eqn.primitive.name}, which keeps its own derivative"
    return f"inside {eqn.primitive.name}, a primitive that this version of msbp_jax does not look into"


def _scaled(eqn: _compat.JaxprEqn, inputs: list[Source]) -> Source | None:
    """Return the source of a weight times a number, or divided by one, which is a weight whatever the number is."""
    if eqn.primitive.name not in ("mul", "div"):
        return None
    for weight, number in ((0, 1), (1, 0))[: 2 if eqn.primitive.name == "mul" else 1]:
        if inputs[weight].is_weight and _compat.shape_of(eqn.invars[number]).shape == ():
            return dataclasses.replace(union(inputs), data=False)
    return None


def _why_not_run(eqn: _compat.JaxprEqn) -> list[str]:
    """Return, for each branch of a `cond`, why it never runs here; "" for those that do, or may."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return ["" for _ in eqn.params["branches"]]
    here = kernels.platform_names()
    chosen = next((number for number, names in enumerate(platforms) if names is None or here & set(names)), None)
    return [
        "" if number == chosen else f"in a branch for {', '.join(names or ('other platforms',))}, which is not run here"
        for number, names in enumerate(platforms)
    ]


def _loop(loop: _sources.LoopId, length: int, weight: Source, both: Source, typed: frozenset[str] | None) -> Loop:
    """Return a loop as a contraction sees it; where JAX itself follows what differs between devices, as JAX does."""
    axis, sharded = loop[1], bool(loop[1]) and loop in both.varies
    instances = loop in weight.varies
    if axis and typed is not None:
        sharded, instances = axis in typed, instances and axis in typed
    return Loop(length=length, instances=instances, mesh_axis=axis, sharded=sharded)


class _Walk:
    def __init__(self) -> None:
        self.found: dict[Place, Found] = {}

    def jaxpr(
        self, jaxpr: _compat.ClosedJaxpr, sources: Sequence[Source], at: _At, constants: Sequence[Source] | None = None
    ) -> list[Source]:
        """Walk one jaxpr; return the sources of its results."""
        known: dict[_compat.Var, Source] = dict.fromkeys(jaxpr.jaxpr.constvars, CONSTANT)
        if constants is not None:
            known.update(zip(jaxpr.jaxpr.constvars, constants, strict=True))
        known.update(zip(jaxpr.jaxpr.invars, sources, strict=True))

        def read(atom: Any) -> Source:
            return CONSTANT if isinstance(atom, _compat.Literal) else known[atom]

        for number, eqn in enumerate(jaxpr.jaxpr.eqns):
            inputs = [read(atom) for atom in eqn.invars]
            outputs = self.equation(eqn, inputs, at.inside(number))
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def equation(self, eqn: _compat.JaxprEqn, inputs: list[Source], at: _At) -> list[Source]:
        """Walk one equation; return the sources of its results."""
        if eqn.primitive.name in CONTRACTIONS:
            self._contraction(eqn, inputs, at)
            return [union(inputs)]
        if reason := _compat.left_alone(eqn):
            self._opaque(eqn, inputs, at.sealed_by(reason))
            return [union(inputs)] * len(eqn.outvars)
        match eqn.primitive:
            case _compat.jit_p | _compat.remat_p:
                return self.jaxpr(_compat.closed(eqn.params["jaxpr"]), inputs, at)
            case _compat.closed_call_p:
                return self.jaxpr(eqn.params["call_jaxpr"], inputs, at)
            case _compat.scan_p:
                return self._scan(eqn, inputs, at)
            case _compat.cond_p:
                results = [
                    self.jaxpr(branch, inputs[1:], at.inside(number).sealed_by(reason))
                    for number, (branch, reason) in enumerate(
                        zip(eqn.params["branches"], _why_not_run(eqn), strict=True)
                    )
                ]
                chosen_by = inputs[0]
                return [union((chosen_by, *results_of)) for results_of in zip(*results, strict=True)]
            case _compat.while_p:
                return self._while(eqn, inputs, at)
            case _ if eqn.primitive.name == "shard_map":
                return self._shard_map(eqn, inputs, at)
            case _:
                self._opaque(eqn, inputs, at.sealed_by(_keeps_its_own(eqn)))
        result = _scaled(eqn, inputs) or union(inputs)
        if eqn.primitive.name == "stop_gradient":
            result = result.stopped()
        elif eqn.primitive.name in _MADE_ALIKE:  # the same on all devices, even if its inputs are not
            result = result.outside(*at.mesh_axes(_compat.axes_of_collective(eqn.params)))
        elif eqn.primitive.name == "axis_index":
            result = result.within(*at.mesh_axes(_compat.axes_of_collective(eqn.params)))
        return [result] * len(eqn.outvars)

    def _contraction(self, eqn: _compat.JaxprEqn, inputs: list[Source], at: _At) -> None:
        lhs, rhs, out = (_compat.shape_of(atom) for atom in (*eqn.invars[:2], *eqn.outvars))
        weight = inputs[0] if inputs[0].is_weight else inputs[1]
        both, typed = union(inputs[:2]), _compat.varying_axes(eqn.invars[:2]) if at.typed else None
        self.found[at.place] = Found(
            place=at.place,
            primitive=eqn.primitive.name,
            params=dict(eqn.params),
            lhs=lhs,
            rhs=rhs,
            out=out,
            lhs_source=inputs[0],
            rhs_source=inputs[1],
            loops=tuple(_loop(*loop, weight, both, typed) for loop in at.loops),
            sealed=at.sealed,
        )

    def _scan(self, eqn: _compat.JaxprEqn, inputs: list[Source], at: _At) -> list[Source]:
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carries = _compat.scan_arity(eqn.params)
        loop = (at.place, "")
        inner = at.within((loop, length))
        # A carry that the body returns unchanged is in effect a constant.
        handed_on = [body.jaxpr.outvars[i] is body.jaxpr.invars[consts + i] for i in range(carries)]
        fixed, carry, sliced = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]
        while True:
            arguments = [
                *fixed,
                *(c if same else c.within(loop) for c, same in zip(carry, handed_on, strict=True)),
                *(s.within(loop) for s in sliced),
            ]
            results = self.jaxpr(body, arguments, inner)
            grown = [c | r.outside(loop) for c, r in zip(carry, results[:carries], strict=True)]
            if grown == list(carry):
                return [*grown, *(r.outside(loop) for r in results[carries:])]
            carry = grown

    def _shard_map(self, eqn: _compat.JaxprEqn, inputs: list[Source], at: _At) -> list[Source]:
        """Walk a body that runs on every device: what a specification cuts up differs from one to the next."""
        sizes = _compat.new_mesh_axes(eqn.params)
        inner = at.within(*(((at.place, axis), size) for axis, size in sizes.items()))
        inner = dataclasses.replace(inner, typed=eqn.params["check_vma"])
        if any(loop[1] for loop, _ in at.loops):
            inner = inner.sealed_by("inside a shard_map within a shard_map")
        arguments = [
            source.within(*inner.mesh_axes(_compat.axes_of_spec(spec)))
            for source, spec in zip(inputs, eqn.params["in_specs"], strict=True)
        ]
        results = self.jaxpr(_compat.closed(eqn.params["jaxpr"]), arguments, inner)
        return [result.outside(*((at.place, axis) for axis in sizes)) for result in results]

    def _while(self, eqn: _compat.JaxprEqn, inputs: list[Source], at: _At) -> list[Source]:
        """Walk a loop without reverse mode: nothing in it can have a rule, but its results have sources."""
        tests, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        fixed, carry = inputs[tests : tests + consts], inputs[tests + consts :]
        body_at = at.sealed_by(_keeps_its_own(eqn)).inside(1)
        while True:
            results = self.jaxpr(eqn.params["body_jaxpr"], [*fixed, *carry], body_at)
            grown = [c | r for c, r in zip(carry, results, strict=True)]
            if grown == list(carry):
                return grown
            carry = grown

    def _opaque(self, eqn: _compat.JaxprEqn, inputs: list[Source], at: _At) -> None:
        """Look into a body that is left alone, so that the report can name what is there."""
        operands = inputs[1:] if eqn.primitive.name == "cond" else inputs  # without the one that chooses the branch
        for number, body in enumerate(_compat.jaxprs_in_params(eqn.params)):
            alike = len(body.invars) == len(operands)
            self.jaxpr(
                _compat.closed(body), operands if alike else [union(inputs)] * len(body.invars), at.inside(number)
            )
