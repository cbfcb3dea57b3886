"""What a report says of a choice: how much it is expected to gain, and where dense would be faster."""

from __future__ import annotations

import jax

from msbp_jax.kernels.choice import target
from msbp_jax.kernels.choice.layer import Layer
from msbp_jax.kernels.choice.order import expected_seconds, fastest_first
from msbp_jax.kernels.native import calls as native_calls


def expected_speed_up(layer: Layer, backend: str | None = None) -> float:
    """Return the expected time of a layer's dense backward over that of its sparse one, select included.

    Args:
      layer: Sizes.
      backend: Backend of the products; None for the one that is chosen.
    """
    chosen = backend or fastest_first(layer)[0]
    plain = expected_seconds("plain", layer)
    products = expected_seconds(chosen, layer)
    if chosen == "dense":  # it runs the plain products, on a matrix that it makes first
        products = max(products, plain)
    return plain / (expected_seconds("select", layer) + products)


def warning(layer: Layer, backend: str | None = None) -> str:
    """Return why a layer's sparse backward will probably be slower than the dense one, or "" if it will not.

    Args:
      layer: Sizes.
      backend: Backend of the products; None for the one that is chosen.
    """
    if not layer.rows:
        return ""
    if backend is not None and backend not in fastest_first(layer):
        interpreted = backend in ("gpu", "tpu") and target.platform() == "cpu"
        return f"the {backend} kernels are interpreted on a CPU: slowly, for tests." if interpreted else ""
    speed_up = expected_speed_up(layer, backend)
    if speed_up >= 1:
        return ""
    text = f"its sparse backward is probably slower than the dense one here (about {speed_up:.2g}x)"
    if (backend or fastest_first(layer)[0]) == "dense":
        text += "; its products run dense, on the sparse gradient, as no sparse path would be faster"
    shared = layer._replace(rows_per_group=min(layer.rows, max(32, layer.rows_per_group)))
    if expected_speed_up(shared, backend) >= 1:
        return f"{text}; rows_per_group=32 or more is faster."
    return f"{text}; a layer of this size and density is better left dense."


def note() -> str:
    """Return what is to be said about this installation or device, or ""."""
    if target.platform() != "cpu":
        reached = ", of which as much is counted on as an H200 reached" if target.platform() == "gpu" else ""
        text = (
            f"Backends and warnings follow from published rates of the device{reached}, not from measurements on this "
            "one; `python -m benchmarks.accelerator` of the source tree measures."
        )
        if target.platform() == "tpu" and jax.device_count() > 1:
            text += " Outside shard_map, xla serves for tpu: JAX cannot split a TPU kernel over devices."
        return text
    if native_calls.available():
        return ""
    return native_calls.NOT_BUILT
