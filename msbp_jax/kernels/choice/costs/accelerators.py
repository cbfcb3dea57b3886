"""Expected times of work on GPUs and TPUs: operations and bytes over the rates that `roofline` says are reached."""

from __future__ import annotations

from collections.abc import Mapping

from msbp_jax.kernels.choice import roofline
from msbp_jax.kernels.choice.target import Device

_ENTRY = 4  # bytes of an entry of loops and sums


def seconds(device: Device, work: Mapping[str, tuple[int | float, ...]]) -> float:
    """Return the expected time of work.

    Args:
      device: What it runs on.
      work: Units by kind. Those of the kind "seconds" are seconds.
    """
    rates = roofline.chip(device)
    add, byte = 2 / (rates.operations * roofline.XLA_REACHES), 1 / rates.bytes_moved
    return sum(
        sum(c * unit for c, unit in zip(_of(kind, add, byte, len(units)), units, strict=True))
        for kind, units in work.items()
    )


def _of(kind: str, add: float, byte: float, count: int) -> tuple[float, ...]:
    """Return the seconds of each unit of a kind: those of multiply-adds, of entries or of bytes."""
    entry = _ENTRY * byte
    match kind:
        case "seconds":
            return (1.0,)
        case "loops":
            return (roofline.CALL_SECONDS, 0.0, 0.0, 0.0, byte, byte)
        case "product, batched":
            return (roofline.CALL_SECONDS, 0.0, add, entry)
        case _ if kind.startswith("product"):
            return (roofline.CALL_SECONDS, add, entry)
        case _ if kind.startswith("convolution"):
            return (roofline.CALL_SECONDS, add, 0.0, 0.0, entry)
        case "copy" | "joining" | "update":
            return (roofline.CALL_SECONDS, byte)
        case "program" | "loop":
            return (roofline.CALL_SECONDS, 0.0)[:count]
        case _:
            return (roofline.CALL_SECONDS, *(entry,) * (count - 1))
