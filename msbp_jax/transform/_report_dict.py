"""A report in plain Python: dicts, lists, numbers and words, as `json.dumps` takes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msbp_jax.transform._report import Report

# Properties that are worth their place beside the fields.
_BESIDE = {
    "StepEstimate": ("plain", "sparse", "speed_up"),
    "LayerEstimate": ("speed_up",),
    "Measured": ("speed_up", "leave_dense", "train_dense"),
}


def to_dict(report: Report) -> dict[str, Any]:
    """Return everything that a report holds."""
    found: dict[str, Any] = _plain(report)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name in _BESIDE.get(type(value).__name__, ()) if name not in names]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no infinity
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
