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
    "convolution": (0.00016, 2.01e-11, 7.08e-11, 7.77e-10, 1.76e-10),
    "convolution, dilated": (0.0, 4.17e-12, 1.21e-10, 0.0, 2.98e-10),
    "convolution, grouped": (0.00397, 0.0, 0.0, 9.03e-08, 1.42e-09),
    "convolution, kernel": (0.0, 2.19e-11, 9.2e-14, 0.0, 1.2e-09),
    "convolution, kernel of one position": (0.000205, 7.29e-11, 4.49e-10, 0.0, 0.0),
    "convolution, one position": (0.0, 1.71e-11, 0.0, 0.0, 5.2e-10),
    "copy": (0.000141, 0.0),
    "gather": (0.0, 0.0),
    "joining": (3.69e-06, 2.21e-10),
    "loop": (0.0, 0.0),
    "loops": (0.0, 6.2e-11, 1.38e-11, 2.27e-10, 0.0, 9.55e-12),
    "native dither": (0.0, 0.0),
    "native entries_grad_input": (7.65e-05, 4.75e-11, 5.22e-10, 0.0),
    "native entries_grad_weight": (7.08e-05, 4.47e-11, 1.38e-09, 0.0),
    "native images_grad_input": (2e-05, 1.05e-11, 1e-10),
    "native images_grad_weight": (2e-05, 1.05e-11, 1e-10),
    "native live_rows": (1.45e-06, 4.87e-10),
    "native row_moments": (0.0, 8.66e-10),
    "native rows_grad_input": (4.44e-05, 2.05e-11, 3.44e-12, 2.85e-10),
    "native rows_grad_weight": (5.8e-05, 2.3e-11, 0.0, 6.77e-11),
    "native select": (1.76e-06, 2.04e-10, 7.5e-10, 5.12e-10),
    "native select_with_memory": (7.21e-06, 1.87e-10, 8.42e-10, 6.83e-10),
    "native, groups grad_input": (1.95e-05, 2.21e-11, 1.09e-10, 2.88e-10),
    "native, groups grad_weight": (2.06e-05, 1.8e-11, 1.56e-10, 3.08e-10),
    "native, lists grad_input": (6.32e-05, 3.98e-11, 2.64e-09, 1.49e-10),
    "native, lists grad_weight": (2.83e-06, 3.43e-11, 2.57e-09, 2.97e-10),
    "pooling": (3.85e-05, 1.12e-10),
    "pooling, back": (0.00028, 1.01e-08),
    "product, batched": (0.000298, 0.0, 8.12e-12, 0.0),
    "product, columns by columns": (9.04e-06, 1.98e-11, 3.72e-10),
    "product, few": (2.74e-05, 3.77e-11, 0.0),
    "product, rows by columns": (0.0, 2.29e-11, 0.0),
    "product, rows by rows": (2.61e-05, 1.9e-11, 2.28e-10),
    "program": (1.01e-05, 6.44e-10),
    "random": (7.86e-06, 3.95e-09),
    "reduction": (3.14e-06, 3.96e-10, 4.17e-10),
    "scan of numbers": (4.71e-05, 0.0),
    "scatter": (0.0, 6.39e-10, 0.0),
    "sort": (1.5e-05, 0.0),
    "update": (3.51e-06, 2.71e-11),
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
