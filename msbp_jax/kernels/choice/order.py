"""In which order the backends of an op are tried: for products, that of their expected times.

On a CPU these were measured (`cpu`); on other platforms they are estimates from published rates and, for GPUs, from
what was measured on an H200 (`roofline`).
"""

from __future__ import annotations

from msbp_jax import _compat
from msbp_jax.formats import Size
from msbp_jax.kernels.choice import cpu, roofline, target
from msbp_jax.kernels.choice.layer import Layer
from msbp_jax.kernels.native import calls as native_calls

# So many rows must share a choice for an accelerator's kernels to pay: with fewer, most of a tile would be empty.
SHARED_ROWS = 16

# How much faster dense must be to be taken: it holds a matrix that the sparse paths do without.
DENSE_MARGIN = 1.15


def selection_order(rows: Size, rows_per_group: Size | None) -> tuple[str, ...]:
    """Return the backends of a selection in the order in which they are tried.

    Args:
      rows: Rows of the gradient.
      rows_per_group: Rows that share a choice; None for all.
    """
    if _compat.is_symbolic(rows):
        return ("xla",)
    few = min(rows, rows_per_group or rows) < SHARED_ROWS
    return ("xla",) if few and target.platform() != "cpu" else (*_own(), "xla")


def products_order(layer: Layer) -> tuple[str, ...]:
    """Return the backends of a layer's products in the order in which they are tried."""
    return ("xla", "dense") if _compat.is_symbolic(layer.rows) else fastest_first(layer)


def fastest_first(layer: Layer) -> tuple[str, ...]:
    """Return the backends of a layer's products in the order of their expected times here."""

    def handicapped(name: str) -> float:
        return expected_seconds(name, layer) * (DENSE_MARGIN if name == "dense" else 1)

    return tuple(sorted((*_own(), "xla", "dense"), key=handicapped))


def expected_seconds(path: str, layer: Layer) -> float:
    """Return the expected time of a path on the device that the program is for.

    Args:
      path: A backend of the products, "plain" for those of a dense backward, or "select".
      layer: Sizes.
    """
    device = target.device()
    if device.platform != "cpu":
        return roofline.seconds(path, device, layer)
    if path == "select":
        path = "select, native" if native_calls.available() else "select, xla"
    return cpu.seconds(cpu.kind_of(path, layer.k, layer.rows_per_group), layer)


def _own() -> tuple[str, ...]:
    """Return the backend made for the platform, if there is one."""
    if (platform := target.platform()) != "cpu":
        return (platform,)
    return ("native",) if native_calls.available() else ()
