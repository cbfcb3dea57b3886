"""Which backend runs an op: the first, of a given order, that does not decline.

A backend declines with `NotImplementedError` ("not me, try the next one"); `ValueError` means that the caller's input
is wrong and is never caught. A backend that is asked for by name is the only one tried, and its error is the caller's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msbp_jax.kernels.native import calls as native_calls


def run[T](
    op: str,
    implementations: Mapping[str, Callable[..., T]],
    backend: str | None,
    *args: Any,
    order: Iterable[str] | None = None,
) -> T:
    """Run `op` on `args` with the first backend that does not decline.

    Args:
      op: Name of the op, for messages.
      implementations: Backend name to function, in order of preference; the reference comes last.
      backend: One name, or None to choose.
      *args: The op's arguments.
      order: Names in another order of preference.

    Raises:
      ValueError: No backend of that name.
      ExceptionGroup: All of them declined; it holds each one's reason.
    """
    if backend is not None:
        return _named(op, implementations, backend)(*args)
    reasons: list[Exception] = []
    for name in order or implementations:
        try:
            return implementations[name](*args)
        except NotImplementedError as declined:
            reasons.append(declined)
    raise ExceptionGroup(f"every backend of {op} declined", reasons or [NotImplementedError("it has no backend")])


def _named[T](op: str, implementations: Mapping[str, Callable[..., T]], backend: str) -> Callable[..., T]:
    if backend not in implementations:
        known = ", ".join(sorted(implementations))
        raise ValueError(f"{op} has no backend {backend!r}. Expected one of: {known}; or None to let it choose.")
    return implementations[backend]


def registry(package: str, op: str, native: Callable[..., Any], **others: Callable[..., Any]) -> dict[str, Any]:
    """Return the backends of an op by name: native code if it was built, accelerators' on demand, then the others.

    Args:
      package: Full name of the op's folder, with the accelerators' files `gpu` and `tpu`.
      op: Its name, which its function has in each of them.
      native: The native backend.
      **others: Those that run everywhere; the reference comes last.
    """
    built = {"native": native} if native_calls.available() else {}
    return built | {platform: _on_demand(f"{package}.{platform}", op) for platform in ("gpu", "tpu")} | others


def _on_demand(module: str, name: str) -> Callable[..., Any]:
    """Return a function that stands for one of a module, which it imports when it is first called.

    Pallas takes nearly as long to import as everything of ours together, and on a CPU nobody needs it.

    Args:
      module: Full name of the module.
      name: Name of the function in it.
    """

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call
