"""Which backend runs the products of a layer: the one whose expected time is least.

On a CPU the times are a linear model in the work that each path does, for two cores; `python -m benchmarks choice`
measures the paths on a grid of shapes, fits the coefficients below, and writes the file that a test holds them against:
whatever is chosen took at most 15 % longer than the best (or 60 microseconds, the cost of two calls). More cores make
every path faster alike, so that the order holds.

On other platforms they are estimates from published rates, `_roofline`, until something is measured there.
"""

from __future__ import annotations

import jax

from msbp_jax import _compat
from msbp_jax.formats import Columns, Size
from msbp_jax.kernels import _native_calls, _platform, _roofline

# Seconds for a call, and for each unit of the work in `_work`, in its order.
COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "native, lists": (2.8e-05, 5.48e-11, 8.51e-09, 5.08e-10),
    "native, groups": (3.03e-05, 2.62e-11, 2.08e-10, 5.08e-10),
    "xla": (8.78e-05, 2.79e-11, 2.03e-09, 8.14e-10),
    "dense": (9.65e-05, 2.22e-11, 3.16e-10, 1.61e-09, 1.46e-09),
    "plain": (6.65e-05, 2.91e-11, 1.29e-09),
    "select, native": (3.44e-05, 1.78e-10, 4.29e-10, 6.38e-10),
    "select, xla": (5.0e-05, 6.0e-10, 1.0e-8, 6.0e-9),
}

# From so many rows on, a choice is worth the kernels of an accelerator: with fewer, most of a tile would be empty.
SHARED_ROWS = 16

# Dense is taken where it is faster by this much, not at a tie: it holds a matrix that the sparse paths do without.
DENSE_MARGIN = 1.15


def kind_of(backend: str, k: int, rows_per_group: Size) -> str:
    """Return the name of the model: the native backend has two paths, and takes them as `by_lists` in native/ does."""
    if backend != "native":
        return backend
    return "native, lists" if rows_per_group < 8 or (rows_per_group < 16 and k < 64) else "native, groups"


def work(kind: str, rows: Size, m: int, n: int, k: int, rows_per_group: Size) -> tuple[int, ...]:
    """Return the units of work that the coefficients of a path multiply.

    Args:
      kind: Name of the path.
      rows: Rows of the gradient.
      m: Input features.
      n: Output features.
      k: Features kept.
      rows_per_group: Rows that share a choice.
    """
    groups = -(-rows // rows_per_group)
    arrays = m * n + rows * m
    match kind:
        case "native, lists":
            return 1, rows * k * m, rows * k, arrays
        case "native, groups" | "xla":
            return 1, rows * k * m, groups * k * m, arrays
        case "dense":
            return 1, rows * m * n, rows * k, rows * n, arrays
        case "plain":
            return 1, rows * m * n, arrays
        case _:
            return 1, rows * n, rows * k, groups * n


def seconds(kind: str, rows: Size, m: int, n: int, k: int, rows_per_group: Size) -> float:
    """Return the expected time of a path, in seconds on two CPU cores; the arguments are those of `work`."""
    units = work(kind, rows, m, n, k, rows_per_group)
    return sum(c * unit for c, unit in zip(COEFFICIENTS[kind], units, strict=True))


def fastest_first(rows: Size, m: int, n: int, k: int, rows_per_group: Size) -> tuple[str, ...]:
    """Return the backends of the products in the order of their expected times here.

    Args:
      rows: Rows of the gradient.
      m: Input features.
      n: Output features.
      k: Features kept.
      rows_per_group: Rows that share a choice.
    """

    def handicapped(name: str) -> float:
        return _expected(name, rows, m, n, k, rows_per_group) * (DENSE_MARGIN if name == "dense" else 1)

    return tuple(sorted((*_own(), "xla", "dense"), key=handicapped))


def _own() -> tuple[str, ...]:
    """Return the backend made for the platform, if there is one."""
    if (platform := _platform.platform()) != "cpu":
        return (platform,)
    return ("native",) if _native_calls.available() else ()


def _expected(path: str, rows: Size, m: int, n: int, k: int, rows_per_group: Size) -> float:
    """Return the expected time, in seconds, of a path on the device that the program is for."""
    layer = rows, m, n, k, rows_per_group
    device = _platform.target()
    if device.platform != "cpu":
        return _roofline.seconds(path, device, *layer)
    if path == "select":
        path = "select, native" if _native_calls.available() else "select, xla"
    return seconds(kind_of(path, k, rows_per_group), *layer)


def selection_order(rows: Size, rows_per_group: Size | None) -> tuple[str, ...]:
    """Return the backends of a selection in the order in which they are tried.

    Args:
      rows: Rows of the gradient.
      rows_per_group: Rows that share a choice; None for all.
    """
    if _compat.is_symbolic(rows):
        return ("xla",)
    few = min(rows, rows_per_group or rows) < SHARED_ROWS
    return ("xla",) if few and _platform.platform() != "cpu" else (*_own(), "xla")


def products_order(cotangent: Columns, m: int) -> tuple[str, ...]:
    """Return `fastest_first` for a compact cotangent and `m` input features."""
    rows, n = cotangent.shape
    if _compat.is_symbolic(rows):
        return ("xla", "dense")
    return fastest_first(rows, m, n, cotangent.kept_per_group, cotangent.rows_per_group)


def expected_speed_up(rows: Size, m: int, n: int, k: int, rows_per_group: Size, backend: str | None = None) -> float:
    """Return the expected time of a layer's dense backward over that of its sparse one, select included.

    Args:
      rows: Rows of the gradient.
      m: Input features.
      n: Output features.
      k: Features kept.
      rows_per_group: Rows that share a choice.
      backend: Backend of the products; None for the one that is chosen.
    """
    layer = rows, m, n, k, rows_per_group
    chosen = backend or fastest_first(*layer)[0]
    plain = _expected("plain", *layer)
    products = _expected(chosen, *layer)
    if chosen == "dense":  # the plain products, and more
        products = max(products, plain)
    return plain / (_expected("select", *layer) + products)


def note() -> str:
    """Return what is to be said about this installation or device, or ""."""
    if _platform.platform() != "cpu":
        text = (
            "Backends and warnings follow from published rates of the device, not from measurements on one; "
            "`python -m benchmarks.accelerator` of the source tree measures."
        )
        if _platform.platform() == "tpu" and jax.device_count() > 1:
            text += " Outside shard_map, xla serves for tpu: JAX cannot split a TPU kernel over devices."
        return text
    if _native_calls.available():
        return ""
    return (
        "The native CPU kernels were not built when msbp_jax was installed, and plain XLA, which is slower, serves. "
        "Install a C++ compiler (GCC or Clang) and msbp_jax again."
    )


def warning(rows: Size, m: int, n: int, k: int, rows_per_group: Size, backend: str | None = None) -> str:
    """Return why a layer's sparse backward will probably be slower than the dense one, or "" if it will not.

    Args:
      rows: Rows of the gradient.
      m: Input features.
      n: Output features.
      k: Features kept.
      rows_per_group: Rows that share a choice.
      backend: Backend of the products; None for the one that is chosen.
    """
    layer = rows, m, n, k, rows_per_group
    if backend is not None and backend not in fastest_first(*layer):
        interpreted = backend in ("gpu", "tpu") and _platform.platform() == "cpu"
        return f"the {backend} kernels are interpreted on a CPU: slowly, for tests." if interpreted else ""
    speed_up = expected_speed_up(*layer, backend)
    if speed_up >= 1:
        return ""
    text = f"its sparse backward is probably slower than the dense one here (about {speed_up:.2g}x)"
    if (backend or fastest_first(*layer)[0]) == "dense":
        text += "; its products run dense, on the sparse gradient, as no sparse path would be faster"
    if expected_speed_up(rows, m, n, k, min(rows, max(32, rows_per_group)), backend) >= 1:
        return f"{text}; rows_per_group=32 or more is faster."
    return f"{text}; a layer of this size and density is better left dense."
