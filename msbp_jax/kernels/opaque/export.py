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


_unless_exporting_p = _compat.Primitive("msbp_unless_exporting")
_unless_exporting_p.multiple_results = True


def unless_exporting(
    call: Callable[..., tuple[jax.Array, ...]], plain: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Return `call(*arrays)`; in an exported program `plain(*arrays)`, which must be the same.

    Neither vmap nor derivatives are known of it: they go around it.
    """
    # As programs, so that JAX sees what they need: one that is split needs to know its devices.
    programs = {name: jax.make_jaxpr(function)(*arrays) for name, function in (("call", call), ("plain", plain))}
    return tuple(_unless_exporting_p.bind(*arrays, **programs))


def _run(program: Any, *arrays: Any) -> Any:
    return _compat.eval_jaxpr(program.jaxpr, program.consts, *arrays)


def _lower_either(context: Any, *arrays: Any, call: Any, plain: Any) -> Any:
    program = plain if _compat.exporting(context) else call
    lower = _compat.mlir.lower_fun(lambda *arrays: _run(program, *arrays), multiple_results=True)
    return lower(context, *arrays)


_unless_exporting_p.def_impl(lambda *arrays, call, plain: _run(call, *arrays))
_unless_exporting_p.def_abstract_eval(lambda *arrays, call, plain: plain.out_avals)
_compat.mlir.register_lowering(_unless_exporting_p, _lower_either)
