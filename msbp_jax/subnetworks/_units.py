"""Units: groups of parameters that live and die together, as axes of the leaves of a pytree."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from msbp_jax._checks import is_array, path_name


class Axis(NamedTuple):
    """An axis along which leaves have the units of a group.

    Attributes:
      path: Of the leaf within its collection, or a pattern of such paths.
      axis: Which, from the front, or from the back where it is negative.
      inner: How many neighbours belong to one unit; entries of an attention head, for example. What is left over is
        how often all units follow one another: the positions of an image that was flattened.
    """

    path: str
    axis: int
    inner: int = 1


class Group(NamedTuple):
    """Units of one kind.

    Attributes:
      size: How many there are.
      axes: Where they are.
    """

    size: int
    axes: tuple[Axis, ...]


class Units(dict[str, Group]):
    """Groups of units by name; `print` it.

    Attributes:
      left: What is no group, and why, by the axes that would be.
      widths: Of a factory, all of its full widths, those of groups that were deleted too.
    """

    left: tuple[tuple[str, str], ...] = ()
    widths: Mapping[str, int] = {}

    def __str__(self) -> str:
        """Return a line for each group with its axes, and for each that is none, with the reason."""
        lines = [f"{name}: {size} units: {', '.join(map(_told, axes))}" for name, (size, axes) in self.items()]
        return "\n".join([*lines, *(f"not {name}: {reason}" for name, reason in self.left)])


class Place(NamedTuple):
    """Where one leaf has units.

    Attributes:
      group: Whose.
      axis: Along which axis.
      outer: How often all units follow one another.
      inner: How many neighbours belong to one.
    """

    group: str
    axis: int
    outer: int
    inner: int


def _told(axis: Axis) -> str:
    return f"{axis.path}[{axis.axis}]" + (f" in {axis.inner}s" if axis.inner > 1 else "")


def is_variables(tree: Any) -> bool:
    """Whether a pytree is a Linen module's variables, collections of which one is "params"."""
    return isinstance(tree, Mapping) and "params" in tree and isinstance(tree["params"], Mapping)


def paths(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a pytree by path; those of variables by their paths within the collections."""
    within = 1 if is_variables(tree) else 0
    return [(path_name(path[within:]), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def places(units: Units, path: str, leaf: Any) -> tuple[Place, ...]:
    """Return where a leaf has units.

    Raises:
      ValueError: An axis that there is not, or that cannot be cut into the units, or that two groups claim.
    """
    if not is_array(leaf):
        return ()
    found: dict[int, Place] = {}
    for name, group in units.items():
        for axis in group.axes:
            if path != axis.path and not fnmatch.fnmatchcase(path, axis.path):
                continue
            if not -leaf.ndim <= axis.axis < leaf.ndim:
                raise ValueError(f"Group {name!r}: {path} has shape {leaf.shape}, and no axis {axis.axis}.")
            at = axis.axis % leaf.ndim
            if leaf.shape[at] % (group.size * axis.inner):
                raise ValueError(
                    f"Group {name!r} has {group.size} units, and axis {at} of {path}, of {leaf.shape[at]} entries, "
                    f"cannot be cut into as many{f' of {axis.inner}' if axis.inner > 1 else ''}."
                )
            place = Place(name, at, leaf.shape[at] // (group.size * axis.inner), axis.inner)
            other = found.setdefault(at, place)
            if other.group != name:
                raise ValueError(f"Axis {at} of {path} is of two groups, {other.group!r} and {name!r}.")
    return tuple(found.values())


def declared(units: Any, tree: Any) -> Units:
    """Return units as they are declared, their sizes from the leaves of a pytree.

    Args:
      units: `{group: [(pattern of paths, axis), ...]}`, or with a third number, the neighbours that belong to one unit.
        The first axis of a group has each unit once: it says how many there are.
      tree: Parameters, or a Linen module's variables.

    Raises:
      TypeError: Units are not declared in this way.
      ValueError: A first pattern without a leaf, or a group of a single unit.
    """
    found = Units()
    for name, group in units.items():
        made = group if isinstance(group, Group) else _group(str(name), group, tree)
        if made.size < 2:
            raise ValueError(f"Group {name!r} has a single unit: there is nothing to choose. Leave it out of units.")
        found[str(name)] = made
    found.left, found.widths = getattr(units, "left", ()), getattr(units, "widths", {})
    return found


def _group(name: str, entries: Any, tree: Any) -> Group:
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise TypeError(f'Group {name!r} must be a list of axes, [("Dense_0/kernel", 1), ...], got {entries!r}.')
    axes = []
    for entry in entries:
        if not (isinstance(entry, Sequence) and len(entry) in (2, 3) and isinstance(entry[0], str)):
            raise TypeError(f"Group {name!r}: expected (pattern of paths, axis), got {entry!r}.")
        axes.append(Axis(entry[0], *(_checked(name, entry, number) for number in entry[1:])))
    first = axes[0]
    leaf = _matched(name, first.path, tree)[0][1]
    if not -leaf.ndim <= first.axis < leaf.ndim:
        raise ValueError(f"Group {name!r}: {first.path} has shape {leaf.shape}, and no axis {first.axis}.")
    return Group(leaf.shape[first.axis] // first.inner, tuple(dict.fromkeys(axes)))


def _checked(name: str, entry: Any, number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"Group {name!r}: expected whole numbers behind the pattern, got {entry!r}.")
    if number is entry[-1] and len(entry) == 3 and number < 1:
        raise ValueError(f"Group {name!r}: at least one entry belongs to a unit, got {entry!r}.")
    return number


def _matched(name: str, pattern: str, tree: Any) -> list[tuple[str, Any]]:
    known = paths(tree)
    found = [(path, leaf) for path, leaf in known if path == pattern or fnmatch.fnmatchcase(path, pattern)]
    if not found:
        raise ValueError(f"Group {name!r}: {pattern!r} matches none of {', '.join(sorted(dict(known)))}.")
    return found


def check(units: Units, tree: Any) -> None:
    """Raise unless every axis of the units is there.

    Raises:
      ValueError: A pattern without a leaf, or as `places`.
    """
    for name, group in units.items():
        for axis in group.axes:
            _matched(name, axis.path, tree)
    for path, leaf in paths(tree):
        places(units, path, leaf)


def total(units: Units) -> int:
    """Return how many units there are in all groups."""
    return sum(group.size for group in units.values())
