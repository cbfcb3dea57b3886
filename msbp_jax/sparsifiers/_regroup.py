"""The same sparsifier with other groups of rows, for those of this library that choose columns by groups."""

from __future__ import annotations

import dataclasses
from typing import Any

from msbp_jax.sparsifiers._base import Count, RowsPerGroup, Sparsifier


def regrouped(sparsifier: Sparsifier, rows_per_group: RowsPerGroup) -> Sparsifier | None:
    """Return a sparsifier that shares its choices among so many rows, or None if it knows no such groups.

    Args:
      sparsifier: One of this library, or what wraps one (`memorized`, `split`).
      rows_per_group: As for `top_k`.
    """
    owner = getattr(sparsifier.apply, "__self__", None)
    changed = _changed(owner, rows_per_group)
    return None if changed is None else changed.sparsifier()


def group_of(sparsifier: Sparsifier) -> tuple[RowsPerGroup] | None:
    """Return the setting of a sparsifier, in a tuple as None is one; None if it has none."""
    found = _settings(getattr(sparsifier.apply, "__self__", None))
    return (found[0],) if found else None


def _chooses_columns(owner: Any) -> bool:
    # Rows that are drawn have groups too, but what is kept or left out together there is not a matter of speed.
    return isinstance(getattr(owner, "count", None), Count) and hasattr(owner, "group")


def _changed(owner: Any, rows_per_group: RowsPerGroup) -> Any:
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        return None
    if _chooses_columns(owner):
        return dataclasses.replace(owner, group=rows_per_group)
    inner: dict[str, Any] = {}
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        changed = regrouped(value, rows_per_group) if isinstance(value, Sparsifier) else _changed(value, rows_per_group)
        if changed is not None:
            inner[field.name] = changed
    return dataclasses.replace(owner, **inner) if inner else None


def _settings(owner: Any) -> list[RowsPerGroup]:
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        return []
    if _chooses_columns(owner):
        group: RowsPerGroup = getattr(owner, "group", None)
        return [group]
    values = [getattr(owner, field.name) for field in dataclasses.fields(owner)]
    owners = [getattr(v.apply, "__self__", None) if isinstance(v, Sparsifier) else v for v in values]
    return [group for inner in owners for group in _settings(inner)]
