"""Calling the native CPU kernels: loading the extension, registering its handlers, and the call itself.

The extension (`native/` of the source tree) is built when the package is installed, if there is a C++ compiler; without
it XLA serves. Its kernels run in the threads of XLA's own pool, in the best instruction set that the processor has, and
sum in an order that depends on shapes alone, so that the number of threads does not show in the result.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msbp_jax import _compat
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.opaque import partition
from msbp_jax.kernels.opaque.axes import by_axes
from msbp_jax.kernels.opaque.derivative import without_derivative
from msbp_jax.kernels.opaque.export import not_exported

NOT_BUILT = (
    "The native CPU kernels were not built when msbp_jax was installed, and plain XLA, which is slower, serves. "
    "Install a C++ compiler (GCC or Clang) and msbp_jax again."
)

MOST_ENTRIES = 2**31
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


@functools.cache
def _extension() -> Any:
    """Return the compiled module, or None where there is none."""
    try:
        return importlib.import_module("msbp_jax.kernels._native")
    except ImportError:
        return None


def available() -> bool:
    """Whether the extension was built and loads."""
    return _extension() is not None


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the build has and this processor runs, in order of preference."""
    return tuple(_extension().instruction_sets()) if available() else ()


@functools.cache
def _register() -> None:
    for name, handler in _extension().handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def check(*arrays: jax.Array) -> None:
    """Decline what the kernels do not do.

    Raises:
      NotImplementedError: Another platform, or a dtype other than float32 and bfloat16.
    """
    check_dtypes(*(array.dtype for array in arrays))
    for array in arrays:
        if _compat.is_symbolic(*array.shape):
            raise NotImplementedError(f"the native kernels take arrays of known sizes, got {array.shape}")


def check_dtypes(*dtypes: Any) -> None:
    """Decline another platform, or dtypes that the kernels have not.

    Raises:
      NotImplementedError: Another platform, or a dtype other than float32 and bfloat16.
    """
    if not available():
        raise NotImplementedError("the native kernels were not built when msbp_jax was installed")
    if (here := target.platform()) != "cpu":
        raise NotImplementedError(f"the native kernels run on CPU, and the program is for {here}")
    for dtype in dtypes:
        if jnp.dtype(dtype) not in DTYPES:
            raise NotImplementedError(f"the native kernels take float32 and bfloat16, got {dtype}")


def runs(*dtypes: Any) -> bool:
    """Whether the kernels run operands of these dtypes here."""
    try:
        check_dtypes(*dtypes)
    except NotImplementedError:
        return False
    return True


def check_entries(entries: int) -> None:
    """Decline what the kernels cannot count: they number entries with 32 bits.

    Raises:
      NotImplementedError: There are too many.
    """
    if entries >= MOST_ENTRIES:
        raise NotImplementedError(f"the native kernels number up to 2^31 entries, got {entries}")


def call(
    name: str,
    operands: Sequence[jax.Array],
    results: Sequence[tuple[tuple[int, ...], Any]],
    instruction_set: int = 0,
    split: tuple[str, int, int] | None = None,
    choose_together: Callable[..., tuple[jax.Array, ...]] | None = None,
    by: str | None = None,
    **attributes: Any,
) -> list[jax.Array]:
    """Call a kernel.

    Args:
      name: Which.
      operands: Its arrays.
      results: Shape and dtype of each array that it returns.
      instruction_set: Place in `instruction_sets()`; anything but 0 is for tests.
      split: How the call may be split over devices: key of `SPLITS`, rows, and rows that share a choice.
      choose_together: What a selection does where devices have parts of its one group; see `opaque.partition`.
      by: Instead of `split`, the axes of its arrays, by any of which it may be split; see `opaque.axes`.
      **attributes: Its numbers; an int is passed as int64, a float as float32, an array as it is.
    """
    _register()
    numbers = {key: _number(value) for key, value in attributes.items()}
    first, *others = operands
    alike, varies, result = _compat.varying_alike([not_exported(first, _NOT_EXPORTED), *others])

    def call_for(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> partition.Call:
        types = [result(shape, dtype) for shape, dtype in shapes]
        function = jax.ffi.ffi_call(f"msbp_{name}", types, vmap_method="expand_dims")
        return lambda *arrays: tuple(function(*arrays, instruction_set=np.int64(instruction_set), **numbers))

    if by is not None:
        return list(without_derivative(name, "native", lambda *arrays: by_axes(by, results, call_for, arrays))(*alike))
    if split is None or varies or jax.device_count() == 1:
        return list(without_derivative(name, "native", call_for(results))(*alike))
    key, rows, group = split
    way = partition.SPLITS[key]
    split_call = partition.partitioned(way, rows, group, results, call_for, choose_together)
    return list(without_derivative(name, "native", split_call)(*alike))


_NOT_EXPORTED = (
    "jax.export cannot write native kernels into a file, which another machine may not have. Export a program "
    "without them: "
    'pass backend="xla" to sparse_vjp or sparse_weights.'
)


def _number(value: Any) -> Any:
    if isinstance(value, bool | np.ndarray):
        return value
    return np.int64(value) if isinstance(value, int) else np.float32(value)
