"""Up to which share of the rows their gathered products are faster than dense ones."""

from __future__ import annotations

from msbp_jax.formats import Size


def rows_pay_below(rows: Size, m: int, n: int) -> float:
    """Return the share of the rows below which products of the kept ones pay, for sizes as in `Layer`."""
    del rows, m, n
    return 0.75
