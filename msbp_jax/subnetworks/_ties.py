"""Which axes a program ties together: each primitive's axes as those of its operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from msbp_jax import _compat
from msbp_jax.subnetworks._factors import Dim, block, flat, fresh, regrouped, unite

type Dims = list[Dim]

_BY_ENTRY: Final = {
    "abs", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bitcast_convert_type", "cbrt", "ceil",
    "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "name", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision", "rem", "reshard",
    "round", "rsqrt", "select_n", "sharding_constraint", "shift_left", "shift_right_logical", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip
_CALLS: Final = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}  # fmt: skip


# What a parameter goes through and stays one, with the axes it has.
_TURNS: Final = {
    "reshape", "transpose", "convert_element_type", "squeeze", "copy", "slice", "dynamic_slice", "sharding_constraint",
}  # fmt: skip


def tie(jaxpr: Any, inputs: Sequence[Dims], parameters: Sequence[bool]) -> list[Dims]:
    """Walk through a program and tie its axes; return those of its results.

    Args:
      jaxpr: An open program.
      inputs: Axes of its arguments.
      parameters: Whether an argument is a parameter, as it is or turned.
    """
    known: dict[Any, Dims] = dict(zip(jaxpr.invars, inputs, strict=True))
    given = {var for var, is_parameter in zip(jaxpr.invars, parameters, strict=True) if is_parameter}

    def of(atom: Any) -> Dims:
        if isinstance(atom, _compat.Literal) or atom not in known:
            return [fresh(length, "it comes from a constant") for length in atom.aval.shape]
        return known[atom]

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        dims = [of(atom) for atom in eqn.invars]
        are = [not isinstance(atom, _compat.Literal) and atom in given for atom in eqn.invars]
        results = _results(name, eqn, dims, are)
        if results is None:
            block([dim for dims_of in dims for dim in dims_of], f"it goes through {name}")
            results = [[fresh(n, f"it comes from {name}") for n in var.aval.shape] for var in eqn.outvars]
        known.update(zip(eqn.outvars, results, strict=True))
        if name in _TURNS and are[0]:
            given.update(eqn.outvars)
    return [of(atom) for atom in jaxpr.outvars]


def _results(name: str, eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims] | None:
    """Return the axes of a primitive's results; None for one that is not known."""
    if name in ("optimization_barrier", "pvary"):
        return dims
    if name in _BY_ENTRY:
        return [_alike(dims, var.aval.shape) for var in eqn.outvars]
    if name in _CALLS and _CALLS[name] in eqn.params:
        return _inside(eqn.params[_CALLS[name]], dims, are)
    if name.startswith(("reduce_window", "cum")):
        return _window(eqn, dims) if name.startswith("reduce_window") else None
    if name.startswith(("reduce_", "argm")):
        return _reduced(name, eqn, dims)
    rule = _RULES.get(name)
    return None if rule is None else rule(eqn, dims, are)


def _alike(dims: list[Dims], shape: tuple[int, ...]) -> Dims:
    """Tie all operands; an axis of length 1 fits any."""
    whole = [of for of in dims if len(of) == len(shape)]
    if not whole:
        return [fresh(length) for length in shape]
    found: Dims = []
    for axis in range(len(shape)):
        long = [of[axis] for of in whole if of[axis]]
        for other in long[1:]:
            unite(long[0], other)
        found.append(long[0] if long else [])
    return found


def _inside(program: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    return tie(getattr(program, "jaxpr", program), dims, are)


def _reduced(name: str, eqn: Any, dims: list[Dims]) -> list[Dims]:
    axes = eqn.params["axes"]
    block([of[axis] for of in dims for axis in axes], f"it is reduced by {name}")
    return [[dim for axis, dim in enumerate(dims[0]) if axis not in axes] for _ in eqn.outvars]


def _window(eqn: Any, dims: list[Dims]) -> list[Dims]:
    shape = eqn.outvars[0].aval.shape
    windows = eqn.params["window_dimensions"]
    found = []
    for axis, dim in enumerate(dims[0]):
        if windows[axis] == 1 and shape[axis] == eqn.invars[0].aval.shape[axis]:
            found.append(dim)
        else:
            block([dim], "a window moves along it")
            found.append(fresh(shape[axis], "a window moves along it"))
    return [found]


def _broadcast(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    del are
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    found = [fresh(length) for length in shape]
    for axis, place in enumerate(places):
        if eqn.invars[0].aval.shape[axis] == shape[place]:
            found[place] = dims[0][axis]
    return [found]


def _dot(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = dims
    for a, b in (*zip(left, right, strict=True), *zip(left_batch, right_batch, strict=True)):
        unite(lhs[a], rhs[b])
    contracted = [lhs[axis] for axis in left]
    if any(are):
        for factor in flat(contracted):
            factor.consumed = True
    else:
        block(contracted, "it is contracted where neither operand is a parameter")
    free = lambda of, *taken: [dim for axis, dim in enumerate(of) if axis not in {*taken[0], *taken[1]}]
    batch = [lhs[axis] for axis in left_batch]
    return [[*batch, *free(lhs, left, left_batch), *free(rhs, right, right_batch)]]


def _convolution(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims] | None:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (batch, features, *places), (outputs, inputs, *window), out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    if eqn.params["batch_group_count"] != 1 or not are[1]:
        return None
    x, w = dims
    if groups == 1:
        unite(x[features], w[inputs])
        for factor in flat([x[features]]):
            factor.consumed = True
    elif groups == eqn.invars[0].aval.shape[features] == eqn.invars[1].aval.shape[outputs]:
        unite(x[features], w[outputs])
    else:
        return None
    reason = "a window moves along it"
    block([x[axis] for axis in places] + [w[axis] for axis in window], reason)
    shape = eqn.outvars[0].aval.shape
    found = [fresh(length, reason) for length in shape]
    found[out[0]], found[out[1]] = x[batch], w[outputs]
    return [found]


def _reshape(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims] | None:
    del are
    return None if eqn.params.get("dimensions") else [regrouped(dims[0], eqn.outvars[0].aval.shape)]


def _transpose(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    del are
    return [[dims[0][axis] for axis in eqn.params["permutation"]]]


def _squeeze(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    del are
    return [[dim for axis, dim in enumerate(dims[0]) if axis not in eqn.params["dimensions"]]]


def _cut(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    """Axes that a slice, a part or a reversal leaves whole stay what they are."""
    del are
    before, name = eqn.invars[0].aval.shape, eqn.primitive.name
    turned = set(eqn.params.get("dimensions", ())) if name == "rev" else set()
    results = []
    for var in eqn.outvars:
        found = []
        for axis, dim in enumerate(dims[0]):
            if var.aval.shape[axis] == before[axis] and axis not in turned:
                found.append(dim)
            else:
                block([dim], f"it goes through {name}")
                found.append(fresh(var.aval.shape[axis], f"it comes from {name}"))
        results.append(found)
    return results


def _padded(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    del are
    found = []
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        if (low, high, inner) == (0, 0, 0):
            found.append(dims[0][axis])
        else:
            block([dims[0][axis]], "it is padded")
            found.append(fresh(eqn.outvars[0].aval.shape[axis], "it is padded"))
    return [found]


def _joined(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    del are
    along = eqn.params["dimension"]
    block([of[along] for of in dims], "it is joined with others")
    shape = eqn.outvars[0].aval.shape
    others = [of[:along] + of[along + 1 :] for of in dims]
    found = _alike(others, (*shape[:along], *shape[along + 1 :]))
    found.insert(along, fresh(shape[along], "it is joined of several"))
    return [found]


def _looked_up(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims] | None:
    """Rows of a table, as of an embedding."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    whole = [axis for axis in range(len(table)) if axis not in numbers.collapsed_slice_dims]
    if not are[0] or any(sizes[axis] != table[axis] for axis in whole) or len(whole) != len(numbers.offset_dims):
        return None
    block([dims[0][axis] for axis in numbers.collapsed_slice_dims], "rows are looked up along it")
    found = [fresh(length, "it is an axis of indices") for length in shape]
    for axis, place in zip(whole, numbers.offset_dims, strict=True):
        found[place] = dims[0][axis]
    return [found]


def _counted(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    del dims, are
    along, shape = eqn.params["dimension"], eqn.params["shape"]
    return [[fresh(n, "it is counted by iota" if axis == along else "") for axis, n in enumerate(shape)]]


def _drawn(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    del dims, are
    return [[fresh(length) for length in var.aval.shape] for var in eqn.outvars]


def _loop(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    consts, carried = _compat.scan_arity(eqn.params)
    xs = dims[consts + carried :]
    block([of[0] for of in xs], "a loop runs along it")
    inner = [*dims[: consts + carried], *(of[1:] for of in xs)]
    jaxpr = eqn.params["jaxpr"]
    found = _inside(jaxpr, inner, [*are[:consts], *([False] * carried), *are[consts + carried :]])
    for start, end in zip(dims[consts : consts + carried], found[:carried], strict=True):
        for a, b in zip(start, end, strict=True):
            unite(a, b)
    length = eqn.params["length"]
    return [*found[:carried], *([fresh(length, "a loop runs along it"), *of] for of in found[carried:])]


def _branches(eqn: Any, dims: list[Dims], are: list[bool]) -> list[Dims]:
    found = [_inside(branch, dims[1:], are[1:]) for branch in eqn.params["branches"]]
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                unite(a, b)
    return found[0]


_RULES: Final[dict[str, Callable[[Any, list[Dims], list[bool]], list[Dims] | None]]] = {
    "broadcast_in_dim": _broadcast, "concatenate": _joined, "cond": _branches, "conv_general_dilated": _convolution,
    "dot_general": _dot, "dynamic_slice": _cut, "gather": _looked_up, "iota": _counted, "pad": _padded,
    "random_bits": _drawn, "random_fold_in": _drawn, "random_seed": _drawn, "random_split": _drawn,
    "random_unwrap": _drawn, "random_wrap": _drawn, "reshape": _reshape, "rev": _cut, "rng_bit_generator": _drawn,
    "scan": _loop, "slice": _cut, "split": _cut, "squeeze": _squeeze, "threefry2x32": _drawn, "transpose": _transpose,
}  # fmt: skip
