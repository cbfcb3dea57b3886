"""Kernels have no derivative of their own: a second derivative through a sparse backward says so, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def without_derivative[T](op: str, kind: str, call: Callable[..., T]) -> Callable[..., T]:
    """Return `call`, which raises `NotImplementedError` when it is differentiated.

    Args:
      op: Name of the op.
      kind: What it runs in, "native" or "Pallas".
      call: A function of arrays.
    """
    guarded = jax.custom_jvp(lambda *arrays: call(*arrays))

    @guarded.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op} ran in a {kind} kernel, which has no derivative, so the sparse backward cannot be differentiated a "
            'second time. For second derivatives pass backend="xla" to sparse_vjp, or to sparse_weights.'
        )

    return guarded
