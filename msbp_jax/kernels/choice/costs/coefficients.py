"""Measured seconds for a unit of each kind of work, on two cores.

`python -m benchmarks "step costs" --fit` measures pieces of steps and prints these. What a step takes differs
from machine to machine by more than its parts do from each other: trust the ratios.
"""

from __future__ import annotations

from collections.abc import Mapping

from msbp_jax.kernels.choice import target
from msbp_jax.kernels.choice.costs import accelerators

# 2026-11-28, 2 x AMD EPYC (Zen 4, AVX-512), jaxlib 0.12.
COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "convolution": (0.000308, 2.07e-11, 9.61e-11, 6.98e-10, 0.0),
    "convolution, dilated": (0.0, 6.29e-12, 9.54e-11, 0.0, 0.0),
    "convolution, grouped": (0.00266, 0.0, 2.95e-08, 1.28e-07, 0.0),
    "convolution, kernel": (0.0, 2.24e-11, 2.48e-11, 0.0, 8.64e-10),
    "convolution, kernel of one position": (0.0, 6.27e-11, 3.76e-09, 0.0, 0.0),
    "convolution, one position": (0.0, 1.76e-11, 0.0, 0.0, 4.77e-10),
    "copy": (0.0, 5.96e-11),
    "gather": (0.0, 0.0),
    "joining": (5.12e-06, 1.42e-10),
    "loop": (0.0, 0.0),
    "loops": (5.89e-07, 3.22e-11, 0.0, 9.92e-12, 7.84e-11, 5.02e-11),
    "native dither": (0.0, 0.0),
    "native entries_grad_input": (5.62e-05, 4.4e-11, 0.0, 0.0),
    "native entries_grad_weight": (0.000129, 3.81e-11, 0.0, 0.0),
    "native images_grad_input": (2e-05, 1.05e-11, 1e-10),
    "native images_grad_weight": (2e-05, 1.05e-11, 1e-10),
    "native live_rows": (2e-07, 4.34e-10),
    "native row_moments": (7.24e-05, 4.35e-10),
    "native rows_grad_input": (3.76e-05, 1.84e-11, 0.0, 1.81e-10),
    "native rows_grad_weight": (5.79e-05, 2.1e-11, 0.0, 0.0),
    "native select": (6.6e-06, 1.51e-10, 3.84e-10, 4.9e-10),
    "native select_with_memory": (1.26e-05, 1.45e-10, 7.5e-10, 6.4e-10),
    "native, groups grad_input": (0.0, 2.28e-11, 1.48e-10, 7.1e-11),
    "native, groups grad_weight": (0.0, 1.49e-11, 3.76e-10, 1.52e-10),
    "native, lists grad_input": (8.33e-06, 3.15e-11, 3.55e-09, 1.2e-10),
    "native, lists grad_weight": (9.74e-05, 3.23e-11, 3.15e-09, 0.0),
    "pooling": (0.0, 4.75e-11),
    "pooling, back": (0.0, 8.72e-09),
    "product, batched": (0.000158, 0.0, 9.97e-12, 1.57e-10),
    "product, columns by columns": (1.48e-05, 3.12e-11, 0.0),
    "product, few": (3.96e-05, 0.0, 3.26e-10),
    "product, rows by columns": (9.32e-06, 2.61e-11, 0.0),
    "product, rows by rows": (4.48e-05, 2.1e-11, 0.0),
    "program": (8.08e-06, 7.28e-10),
    "random": (1.01e-05, 3e-09),
    "reduction": (9.42e-07, 1.24e-10, 0.0),
    "scan of numbers": (4.74e-05, 0.0),
    "scatter": (0.0, 6.82e-10, 0.0),
    "sort": (2.04e-05, 0.0),
    "update": (2.06e-06, 5.86e-11),
}


def seconds(work: Mapping[str, tuple[int | float, ...]]) -> float:
    """Return the expected time of work, in seconds, on the device that the program is for."""
    device = target.device()
    if device.platform != "cpu":
        return accelerators.seconds(device, work)
    return sum(
        coefficient * unit
        for kind, units in work.items()
        for coefficient, unit in zip(COEFFICIENTS.get(kind, (0.0,) * len(units)), units, strict=True)
    )
