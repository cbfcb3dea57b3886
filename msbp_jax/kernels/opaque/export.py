"""What `jax.export` cannot write into a file: a hint to XLA is left out there, a native kernel says what to do instead.

Only the lowering of a program knows what it is for, so that both are a primitive of our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from msbp_jax import _compat

_by_purpose_p = _compat.Primitive("msbp_by_purpose")


def unless_exported(hint: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """Return `hint(array)`, which must be `array` up to how it is computed; in an exported program the array itself."""
    return _by_purpose_p.bind(array, hint=hint, refusal="")


def not_exported(array: jax.Array, refusal: str) -> jax.Array:
    """Return the array; exporting the program raises `NotImplementedError` with this message."""
    return _by_purpose_p.bind(array, hint=None, refusal=refusal)


def _hinted(array: Any, *, hint: Callable[[Any], Any] | None, refusal: str) -> Any:
    del refusal
    return array if hint is None else hint(array)


def _lower(context: Any, array: Any, *, hint: Callable[[Any], Any] | None, refusal: str) -> Any:
    exporting = _compat.exporting(context)
    if exporting and refusal:
        raise NotImplementedError(refusal)
    lower = _compat.mlir.lower_fun(_hinted, multiple_results=False)
    return lower(context, array, hint=None if exporting else hint, refusal=refusal)


_by_purpose_p.def_impl(_hinted)
_by_purpose_p.def_abstract_eval(lambda array, *, hint, refusal: array)
_compat.mlir.register_lowering(_by_purpose_p, _lower)
_compat.ad.deflinear2(_by_purpose_p, lambda cotangent, array, **params: [cotangent])
_compat.batching.defvectorized(_by_purpose_p)
