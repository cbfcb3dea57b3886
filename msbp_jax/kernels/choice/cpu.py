"""Expected times on a CPU: a linear model in the work that each path does, for two cores.

`python -m benchmarks choice` measures the paths on a grid of shapes, fits the coefficients below, and writes the file
that a test holds them against: whatever is chosen took at most 15 % longer than the best (or 60 microseconds, the cost
of two calls). More cores make every path faster alike, so that the order holds.
"""

from __future__ import annotations

from msbp_jax.formats import Size
from msbp_jax.kernels.choice.layer import Layer

# Seconds for a call, then for a unit of each kind of work, in the order of `work`.
COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "native, lists": (2.8e-05, 5.48e-11, 8.51e-09, 5.08e-10),
    "native, groups": (3.03e-05, 2.62e-11, 2.08e-10, 5.08e-10),
    "xla": (8.78e-05, 2.79e-11, 2.03e-09, 8.14e-10),
    "dense": (9.65e-05, 2.22e-11, 3.16e-10, 1.61e-09, 1.46e-09),
    "plain": (6.65e-05, 2.91e-11, 1.29e-09),
    "select, native": (3.44e-05, 1.78e-10, 4.29e-10, 6.38e-10),
    "select, xla": (5.0e-05, 6.0e-10, 1.0e-8, 6.0e-9),
}


def kind_of(backend: str, k: int, rows_per_group: Size) -> str:
    """Return the name of the model: the native backend has two paths, and takes them as `by_lists` in native/ does."""
    if backend != "native":
        return backend
    return "native, lists" if rows_per_group < 8 or (rows_per_group < 16 and k < 64) else "native, groups"


def work(kind: str, layer: Layer) -> tuple[int, ...]:
    """Return the units of work that the coefficients of a path multiply.

    Args:
      kind: Name of the path.
      layer: Sizes.
    """
    rows, m, n, k, _ = layer
    arrays = m * n + rows * m
    match kind:
        case "native, lists":
            return 1, rows * k * m, rows * k, arrays
        case "native, groups" | "xla":
            return 1, rows * k * m, layer.groups * k * m, arrays
        case "dense":
            return 1, rows * m * n, rows * k, rows * n, arrays
        case "plain":
            return 1, rows * m * n, arrays
        case _:
            return 1, rows * n, rows * k, layer.groups * n


def seconds(kind: str, layer: Layer) -> float:
    """Return the expected time of a path, in seconds on two cores; the arguments are those of `work`."""
    return sum(c * unit for c, unit in zip(COEFFICIENTS[kind], work(kind, layer), strict=True))
