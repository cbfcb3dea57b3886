"""What a layer's sparse backward costs beside the dense one, as far as it is known before running.

A rough model of the XLA backend on two CPU cores, fitted to the table `crossover` of benchmarks/README.md. It is meant
for a warning, not for choosing: it tells 2x from 0.5x.
"""

from __future__ import annotations

import jax

_FLOPS = 1.3e11  # dense products, per second
_SPARSE_FLOPS = 1.0e11  # the same in small pieces
_GATHER_BYTES = 1.8e9  # rows of the weight gathered, and of its gradient added, per second
_STREAM_BYTES = 8e9  # arrays read or written once
_DENSE_START, _SPARSE_START = 3e-5, 4.5e-5  # seconds of a call with nothing to do


def expected_speed_up(rows: int, m: int, n: int, k: int, rows_per_group: int) -> float:
    """Return the expected time of a layer's dense backward over that of its sparse one, on a CPU.

    Args:
      rows: Rows of the gradient.
      m: Input features.
      n: Output features.
      k: Features kept.
      rows_per_group: Rows that share a choice.
    """
    groups = -(-rows // rows_per_group)
    dense = _DENSE_START + 4 * rows * m * n / _FLOPS
    products = 4 * rows * m * k / _SPARSE_FLOPS
    moved = 8 * groups * k * m / _GATHER_BYTES + 4 * (m * n + rows * n) / _STREAM_BYTES
    return dense / (_SPARSE_START + products + moved)


def warning(rows: int, m: int, n: int, k: int, rows_per_group: int) -> str:
    """Return why a layer's sparse backward will probably be slower than the dense one, or "" if it will not.

    Args:
      rows: Rows of the gradient.
      m: Input features.
      n: Output features.
      k: Features kept.
      rows_per_group: Rows that share a choice.
    """
    if jax.default_backend() != "cpu":
        return ""  # nothing was measured there
    speed_up = expected_speed_up(rows, m, n, k, rows_per_group)
    if speed_up >= 1:
        return ""
    larger = expected_speed_up(rows, m, n, k, min(rows, max(32, rows_per_group))) >= 1
    instead = "rows_per_group=32 or more is faster" if larger else "a layer this small is better left dense"
    return f"its sparse backward is probably slower than the dense one here (about {speed_up:.1f}x); {instead}."
