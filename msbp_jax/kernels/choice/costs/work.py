"""The work of a program: how many units of each kind, on which measured seconds follow.

A kind is what runs by one piece of code, such as a matrix product or a native kernel. Its units are a call, and
whatever else its time grows with: multiply-adds, entries, bytes.
"""

from __future__ import annotations

import bisect
import math
from typing import Any

from msbp_jax import _compat
from msbp_jax.kernels.choice.costs import contractions, native
from msbp_jax.kernels.choice.costs.coefficients import seconds
from msbp_jax.kernels.choice.costs.equations import Equation, Listing, bytes_of, listing, size_of
from msbp_jax.kernels.choice.costs.fusion import arrays, elementwise, is_fused
from msbp_jax.kernels.choice.costs.memory import fresh_memory
from msbp_jax.kernels.rows.ladder import SHARES

# Units by kind.
type Work = dict[str, tuple[int | float, ...]]


def work_of(program: _compat.ClosedJaxpr, share: float = 1.0, wanted: Any = None) -> Work:
    """Return the work of a program.

    Loops whose length only the run tells count once, and of branches the dearest.

    Args:
      program: Traced.
      share: The share of rows or entries that is kept where only the run tells.
      wanted: Which results are asked for; all by default.
    """
    return _of_listing(listing(program, wanted), share)


def _of_listing(listed: Listing, share: float) -> Work:
    total: dict[tuple[str, int], float] = {}
    _add(total, elementwise(listed, arrays(listed)), 1)
    for equation in listed.equations:
        if not is_fused(equation):
            _add(total, _of(equation, share), 1)
    return _grouped(total)


def work_of_run(program: _compat.ClosedJaxpr, share: float = 1.0, *, within: bool = False) -> Work:
    """Return the work of a program that is called by itself: that of the call, and of getting its memory, too.

    Args:
      program: Traced.
      share: As in `work_of`.
      within: Whether it is a part of a larger program, which uses its results.
    """
    listed = listing(program)
    return joined(_of_listing(listed, share), {"program": (1, fresh_memory(listed, within=within))})


def joined(*works: Work) -> Work:
    """Return the work of all."""
    total: dict[tuple[str, int], float] = {}
    for work in works:
        _add(total, work, 1)
    return _grouped(total)


def times(work: Work, number: int | float) -> Work:
    """Return the work done so many times."""
    return {kind: tuple(number * unit for unit in units) for kind, units in work.items()}


def _of(equation: Equation, share: float) -> Work:
    name, params = equation.name, equation.params
    match name:
        case "dot_general":
            return contractions.of_dot(equation)
        case "ragged_dot_general":
            return contractions.of_ragged_dot(equation)
        case "conv_general_dilated":
            return contractions.of_convolution(equation)
        case "ffi_call":
            return native.of_call(equation, share)
        case "scan":
            return _of_scan(equation, share)
        case "while":
            return joined(*(work_of(_compat.closed(params[body]), share) for body in ("cond_jaxpr", "body_jaxpr")))
        case "cond":
            return _of_branches(equation, share)
        case "shard_map":
            devices = math.prod(_compat.new_mesh_axes(params).values())
            return times(work_of(_compat.closed(params["jaxpr"]), share), devices)
    made, read = sum(map(size_of, equation.results)), sum(map(size_of, equation.avals))
    if name.startswith("select_and_"):
        return {"pooling, back": (1, made)}
    if name.startswith("reduce_window"):
        return {"pooling": (1, made * math.prod(params["window_dimensions"]))}
    if name.startswith("reduce") or name in ("argmax", "argmin"):
        last = len(equation.avals[0].shape) - 1 in params.get("axes", ())
        return {"reduction": (1, size_of(equation.avals[0]) * last, size_of(equation.avals[0]) * (not last))}
    if name == "gather":
        return {"gather": (1, made)}
    if name.startswith("scatter"):
        return {"scatter": (1, size_of(equation.avals[-1]), made)}
    if name == "dynamic_update_slice":  # in place
        return {"copy": (1, bytes_of(equation.avals[1]))}
    if name in ("sort", "top_k", "approx_top_k"):
        return {"sort": (1, read * math.log2(max(2, equation.avals[0].shape[-1])))}
    if "random" in name or "threefry" in name or name.startswith("rng"):
        return {"random": (1, made)}
    if name.startswith("cum"):
        return {"scan of numbers": (1, made)}
    if name == "concatenate":
        return {"joining": (1, sum(map(bytes_of, equation.results)))}
    return {"copy": (1, sum(map(bytes_of, equation.results)))}


def _of_scan(equation: Equation, share: float) -> Work:
    """Return the work of all iterations; what goes in and comes out slice by slice is copied once."""
    params, length = equation.params, equation.params["length"]
    constants, carries = _compat.scan_arity(params)
    moved = sum(map(bytes_of, equation.avals[constants + carries :])) + sum(map(bytes_of, equation.results[carries:]))
    once, each = listing(params["jaxpr"]).split(constants)
    body = times(_of_listing(each, share), length)
    return joined(_of_listing(once, share), body, {"loop": (1, length), "copy": (0, moved)})


def _of_branches(equation: Equation, share: float) -> Work:
    """Return the work of the dearest branch; of one for each share of the rows, that of the rung that is climbed to."""
    works = [work_of(branch, share) for branch in equation.params["branches"]]
    if len(works) == len(SHARES) + 1:
        return works[bisect.bisect_left(SHARES, share)]
    return max(works, key=seconds)


def _add(total: dict[tuple[str, int], float], work: Work, number: int | float) -> None:
    for kind, units in work.items():
        for place, unit in enumerate(units):
            total[kind, place] = total.get((kind, place), 0.0) + float(number * unit)


def _grouped(total: dict[tuple[str, int], float]) -> Work:
    kinds = dict.fromkeys(kind for kind, _ in total)
    longest = {kind: 1 + max(place for k, place in total if k == kind) for kind in kinds}
    return {kind: tuple(total[kind, i] for i in range(longest[kind])) for kind in kinds}
