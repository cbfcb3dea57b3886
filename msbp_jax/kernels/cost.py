"""What a sparse backward costs beside the dense one, as far as it is known before running."""

from __future__ import annotations


def warning(rows: int, m: int, n: int, k: int, rows_per_group: int) -> str:
    """Return why the sparse backward of a layer will probably be slower than the dense one, or ""."""
    return ""
