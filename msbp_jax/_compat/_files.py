"""Programs that `jax.export` writes into files."""

from __future__ import annotations

from typing import Any

import jax.export
import numpy as np


def exporting(context: Any) -> bool:
    """Whether the program that a lowering rule is asked to lower goes into a file of `jax.export`."""
    return bool(getattr(context.module_context.lowering_parameters, "for_export", False))


def serializable(state: Any) -> None:
    """Let `jax.export` write the name of a NamedTuple of this package into its files."""
    jax.export.register_namedtuple_serialization(state, serialized_name=f"msbp_jax.{state.__name__}")


def is_symbolic(*sizes: Any) -> bool:
    """Whether one of these sizes is a dimension variable of `jax.export`, of which little is known."""
    return not all(isinstance(size, int | np.integer) for size in sizes)
