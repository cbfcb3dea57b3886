"""`find_units`: the units of a model, from the program that it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from msbp_jax._checks import is_array, path_name
from msbp_jax.sparsifiers._metrics import unique_name
from msbp_jax.subnetworks._factors import Factor, block, flat, fresh
from msbp_jax.subnetworks._ties import tie
from msbp_jax.subnetworks._units import Axis, Group, Units, is_variables, paths, places


def find_units(target: Any, params: Any, *args: Any, widths: Mapping[str, int] | None = None, **kwargs: Any) -> Units:
    """Return the units of a model: axes of its parameters that its program ties together, and that can be narrower.

    A unit's output columns, its bias and normalisation, and the rows of all layers that read it, through residual
    connections, flattened images and loops. An axis of the model's arguments or results is none, nor is one that is
    reduced (as a layer norm does), cut, joined or counted along, or contracted between two arrays that were computed:
    these are named, with the reason, when the result is printed.

    Args:
      target: A function `f(params, *args)`, or a factory `build(widths)` of Linen modules.
      params: Parameters of the function, or variables of the module at its full widths; their shapes are enough.
      *args: As the function or the module takes them; shapes are enough.
      widths: Of a factory: its full widths by name. Groups have these names then; those of a function are named after
        the first parameter.
      **kwargs: As the function or the module takes them.

    Returns:
      What `msbp.subnetwork` takes as `units`; a dict, from which groups may be deleted.

    Raises:
      ValueError: A width of a factory changes axes that are not tied together, or that cannot be narrower.
      TypeError: A factory without its widths, or one that returns no module.

    Example:
      >>> import jax, jax.numpy as jnp, msbp_jax as msbp
      >>> f = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.ones((4, 64)), "v": jnp.ones((64, 3))}
      >>> msbp.find_units(f, params, jnp.ones((2, 4)))
      {'v': Group(size=64, axes=(Axis(path='v', axis=0, inner=1), Axis(path='w', axis=1, inner=1)))}

    References:
      Fang et al., DepGraph: towards any structural pruning, 2023 (arXiv 2301.12900), for ties of a whole network.
    """
    if widths is None:
        if is_factory(target):
            raise TypeError('A factory of modules has widths: find_units(build, variables, x, widths={"hidden": 512}).')
        return _named(_factors(target, params, args, kwargs))
    if single := [name for name, width in widths.items() if width < 2]:
        raise ValueError(f"The width {single[0]!r} is {widths[single[0]]}: there is nothing to choose. Leave it out.")

    groups = _factors(_run_of(target, widths), params, args, kwargs)
    return _of_widths(target, dict(widths), groups, args, kwargs)


def is_factory(target: Any) -> bool:
    """Whether a target is a factory of modules: a callable of a single argument."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


def built(build: Callable[[dict[str, int]], Any], widths: Mapping[str, int]) -> Any:
    """Return the module of some widths.

    Raises:
      TypeError: The factory returned something that has no `apply`.
    """
    module = build(dict(widths))
    if not hasattr(module, "apply") or not hasattr(module, "init"):
        raise TypeError(
            f"A factory takes widths, a dict, and returns a Linen module, got {module!r}. A model that is a function "
            "takes its parameters and at least one more argument: f(params, x)."
        )
    return module


class _Found:
    """Axes of parameters that are one factor, each with how often the factor is in it."""

    def __init__(self, factor: Factor) -> None:
        self.factor = factor
        self.axes: list[tuple[int, Axis]] = []

    @property
    def places(self) -> set[tuple[str, int]]:
        """Leaves and axes."""
        return {(axis.path, axis.axis) for _, axis in self.axes}


def _factors(run: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Found]:
    """Return the factors of the axes of parameters, and where they are."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(params)
    within = 1 if is_variables(params) else 0
    of_arrays, arrays = _of_arrays(args, kwargs)

    def flattened(leaves: list[Any], arrays: list[Any]) -> Any:
        args, kwargs = of_arrays(arrays)
        return run(jax.tree.unflatten(structure, leaves), *args, **kwargs)

    program = jax.make_jaxpr(flattened)([leaf for _, leaf in keyed], arrays)
    jaxpr: Any = program.jaxpr
    dims = [[fresh(length) for length in var.aval.shape] for var in jaxpr.invars]
    for of in dims[len(keyed) :]:
        block(of, "it is an axis of the model's arguments")
    results = tie(jaxpr, dims, [at < len(keyed) for at in range(len(dims))])
    for of in results:
        block(of, "it is an axis of the model's results")
    found: dict[int, _Found] = {}
    for (path, _), of in zip(keyed, dims, strict=False):
        for axis, dim in enumerate(of):
            parts = flat([dim])
            for at, factor in enumerate(parts):
                outer, inner = (math.prod(part.size for part in side) for side in (parts[:at], parts[at + 1 :]))
                one = found.setdefault(id(factor), _Found(factor))
                one.axes.append((outer, Axis(path_name(path[within:]), axis, inner)))
    return list(found.values())


def _of_arrays(args: Any, kwargs: Any) -> tuple[Callable[[list[Any]], tuple[Any, Any]], list[Any]]:
    """Return arguments as a function of the arrays among them, and these; flags and numbers stay what they are."""
    leaves, structure = jax.tree.flatten((args, kwargs))

    def filled(arrays: list[Any]) -> tuple[Any, Any]:
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if is_array(leaf) else leaf for leaf in leaves])

    return filled, [leaf for leaf in leaves if is_array(leaf)]


def _named(groups: list[_Found]) -> Units:
    units, left = Units(), []
    for group in groups:
        name = unique_name(group.axes[0][1].path.rsplit("/", 1)[0], units)
        reason = group.factor.reason or ("" if group.factor.consumed else "no parameter reads it")
        if reason:
            left.append((name, f"{_told(group)}: {reason}"))
        else:
            units[name] = _group(group)
    units.left = tuple(left)
    return units


def _group(group: _Found) -> Group:
    """Return a group, the axis that has each unit once in front."""
    return Group(group.factor.size, tuple(axis for _, axis in sorted(group.axes, key=lambda one: one[0])))


def _told(group: _Found) -> str:
    return ", ".join(f"{axis.path}[{axis.axis}]" for _, axis in group.axes)


def _of_widths(
    build: Any, widths: dict[str, int], groups: list[_Found], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Units:
    """Return the groups that the widths of a factory change, by the names of the widths."""
    shapes = lambda of: _shapes(built(build, of), args, kwargs)
    whole = shapes(widths)
    units = Units()
    for name in widths:
        smaller = _smaller(shapes, widths, name)
        changed = {
            (path, axis)
            for path, shape in whole.items()
            for axis, length in enumerate(shape)
            if smaller.get(path, shape)[axis] != length
        }
        owners = [group for group in groups if group.places & changed]
        usable = [group for group in owners if not group.factor.reason and group.factor.consumed]
        fitting = [group for group in usable if group.places == changed]
        if not fitting:
            reasons = "; ".join(f"{_told(group)}: {group.factor.reason or 'tied'}" for group in owners)
            axes = ", ".join(f"{path}[{axis}]" for path, axis in sorted(changed)) or "nothing"
            raise ValueError(
                f"The width {name!r} changes {axes}, which are not the axes of units that can be left out. Found: "
                f"{reasons or 'none'}. Declare the units, or give those axes widths of their own."
            )
        units[name] = _group(max(fitting, key=lambda group: group.factor.size))
    units.widths = widths
    blocked = (group for group in groups if group.factor.reason)
    units.left = tuple((group.axes[0][1].path, f"{_told(group)}: {group.factor.reason}") for group in blocked)
    return units


def _smaller(
    shapes: Callable[[dict[str, int]], dict[str, tuple[int, ...]]], widths: dict[str, int], name: str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes at a smaller width, the first that the module can have."""
    width = widths[name]
    errors: list[Exception] = []
    for smaller in dict.fromkeys((width // 2, 2 * (width // 3), 3 * (width // 4), width - 1)):
        try:
            return shapes({**widths, name: smaller})
        except Exception as error:
            errors.append(error)
    raise ValueError(
        f"With a width {name!r} of {width // 2} in place of {width} the module cannot be initialized: "
        f"{type(errors[0]).__name__}: {str(errors[0]).splitlines()[0]}"
    ) from errors[0]


def blocked_axes(
    target: Any, units: Units, widths: Mapping[str, int], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """Return (group, axis, reason) for units whose number the program itself depends on, where that is certain.

    Args:
      target: A function, or a factory.
      units: Where units are.
      widths: Of a factory, in full; empty for a function.
      params: The whole parameters, or variables.
      args: Of the model.
      kwargs: Of the model.
    """
    run = _run_of(target, widths) if widths else target
    factors: dict[tuple[str, int], list[Factor]] = {}
    for found in _factors(run, params, args, kwargs):
        for of_leaf in found.places:
            factors.setdefault(of_leaf, []).append(found.factor)
    blocked = []
    for path, leaf in paths(params):
        for place in places(units, path, leaf):
            same = [one for one in factors.get((path, place.axis), []) if one.size == units[place.group].size]
            reasons = [one.reason for one in same]
            if reasons and all(reason.startswith(_CERTAIN) for reason in reasons):
                blocked.append((place.group, f"{path}[{place.axis}]", reasons[0]))
    return blocked


# Reasons that say what the program does with all units together, as opposed to what is not known of it.
_CERTAIN = (
    "it is reduced by",
    "it is contracted where neither",
    "it is counted by",
    "it comes from a constant",
)


def _run_of(build: Any, widths: Mapping[str, int]) -> Callable[..., Any]:
    """Return the module of some widths as a function of its variables."""

    def run(variables: Any, *args: Any, **kwargs: Any) -> Any:
        result = built(build, widths).apply(variables, *args, **kwargs)
        return result[0] if kwargs.get("mutable") else result  # what it changes is as wide as what it holds

    return run


def _shapes(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    options = {name: value for name, value in kwargs.items() if name not in ("rngs", "mutable")}
    of_arrays, arrays = _of_arrays(args, options)

    def init(arrays: list[Any]) -> Any:
        args, options = of_arrays(arrays)
        return module.init(rngs, *args, **options)

    variables = jax.eval_shape(init, arrays)
    keyed = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {path_name(path[1:]): tuple(leaf.shape) for path, leaf in keyed}
