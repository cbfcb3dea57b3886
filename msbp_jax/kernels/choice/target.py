"""For which device a program is being traced.

That is the default one, unless the program is traced under a mesh that names another: this is how JAX compiles ahead of
time, for a device that the machine need not have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

_NAMES = {"cuda": "gpu", "rocm": "gpu"}


class Device(NamedTuple):
    """What is known of the device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: Its name, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
    """

    platform: str
    kind: str


def device() -> Device:
    """Return the device that the program now traced is for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(_NAMES.get(abstract.platform, abstract.platform), abstract.device_kind)
    chosen = _chosen()
    platform = jax.default_backend() if chosen is None else chosen.platform
    return Device(_NAMES.get(platform, platform), (chosen or jax.devices()[0]).device_kind)


def platform() -> str:
    """Return "cpu", "gpu" or "tpu"."""
    return device().platform


def names() -> frozenset[str]:
    """Return the names that JAX has for the platform, in `lax.platform_dependent` for example."""
    name = platform()
    if name != "gpu":
        return frozenset({name})
    return frozenset({"gpu", "cuda" if "NVIDIA" in device().kind else "rocm"})


def _chosen() -> Any:
    """Return the device that `jax.default_device` names, None for none."""
    chosen = jax.config.jax_default_device
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen
