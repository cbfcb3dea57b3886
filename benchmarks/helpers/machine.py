"""What figures were measured with."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
from typing import Any

import jax

import msbp_jax as msbp
from msbp_jax.kernels.native import calls


def describe(torch: str) -> dict[str, Any]:
    """Return the processor and the versions.

    Args:
      torch: PyTorch's version, or why it is not there.
    """
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": f"{len(models)} x {models[0]}" if models else platform.machine(),
        "instruction sets": list(calls.instruction_sets()),
        "devices": str(jax.devices()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "msbp_jax": msbp.__version__,
        "torch": torch,
    }


def head(command: str, date: str) -> str:
    """Return the line above a table: what wrote it, when, and on what.

    Args:
      command: As it is typed.
      date: As 2026-11-21.
    """
    about = describe("not used")
    kernels = (about["instruction sets"] or ["no native kernels"])[0]
    return f"Written by `{command}`, {date}, {about['processor']} ({kernels}), JAX {about['jax']}"


def describe_accelerator() -> dict[str, Any]:
    """Return the kind of device and the versions of what compiles for it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"device": jax.devices()[0].device_kind, "versions": versions}
