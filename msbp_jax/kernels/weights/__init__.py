"""Products with a sparse weight: `y = x w`, `dx = g wᵀ`, and dw at the entries of the pattern.

| backend | |
|---|---|
| native | lists of entries, on a CPU: only they are multiplied |
| unpacked | the dense weight, made of the entries by native code; dw is a dense product of which they are taken |
| tiles | blocks of entries, as small dense products of XLA's: on accelerators |
| xla | the dense weight, made first; dw is a dense product of which the entries are taken |

On a CPU the native one is taken up to the share of entries where it is measured to be faster, and "unpacked" above
that; on a GPU or TPU tiles, where there are blocks, down to 8 x 8. Elsewhere the dense products run.
"""

from __future__ import annotations

from typing import Any, Final

import jax
from jaxtyping import Array, Float

from msbp_jax import _compat
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.native import calls
from msbp_jax.kernels.weights import dense, native, tiles
from msbp_jax.weights import Pattern

_BACKENDS: Final[dict[str, Any]] = {"native": native, "unpacked": dense.UNPACKED, "tiles": tiles, "xla": dense.XLA}

# Up to which share of the entries lists are faster than products with a weight that is dense, by rows of the input.
_BREAK_EVEN: Final = ((256, 0.33), (64, 0.25), (0, 0.12))


def times(
    x: Float[Array, "rows inner"],
    values: Float[Array, " entries"],
    pattern: Pattern,
    turned: bool,
    *,
    precision: Any = None,
    backend: str | None = None,
) -> Float[Array, "rows outer"]:
    """Return `x w`, or `x wᵀ` where `turned`, float32 or float64.

    Args:
      x: `[rows, m]`, or `[rows, n]` where `turned`.
      values: Of the weight's entries.
      pattern: Where they stand; of one layer.
      turned: Whether the features are contracted.
      precision: As in `lax.dot_general`; native sums are float32 throughout.
      backend: "native", "tiles" or "xla"; None to choose.

    Raises:
      NotImplementedError: The backend that is named cannot.
    """
    run = _BACKENDS[_chosen(backend, pattern, values, x)]
    return run.times(x, values, pattern, turned, precision)


def gradient(
    x: Float[Array, "rows m"],
    g: Float[Array, "rows n"],
    pattern: Pattern,
    *,
    precision: Any = None,
    backend: str | None = None,
) -> Float[Array, " entries"]:
    """Return the entries of `xᵀ g` at a pattern, 0 for its padding, float32 or float64.

    Args:
      x: `[rows, m]`.
      g: `[rows, n]`.
      pattern: Which entries; of one layer.
      precision: As in `lax.dot_general`; native sums are float32 throughout.
      backend: "native", "tiles" or "xla"; None to choose.

    Raises:
      NotImplementedError: The backend that is named cannot.
    """
    return _BACKENDS[_chosen(backend, pattern, x, g)].gradient(x, g, pattern, precision)


def break_even(rows: int) -> float:
    """Return the share of the entries up to which a sparse weight is faster than a dense one, for so many rows."""
    return next(share for least, share in _BREAK_EVEN if rows >= least)


def native_is_available() -> bool:
    """Whether the native kernels were built."""
    return calls.available()


def chosen(pattern: Pattern, rows: Any, *dtypes: Any) -> str:
    """Return the backend that runs products of so many rows and operands of these dtypes here."""
    if _compat.is_symbolic(rows):
        return "xla"
    if target.platform() != "cpu" and pattern.block is not None and min(pattern.block) >= 8:
        return "tiles"
    if not calls.runs(*dtypes):
        return "xla"
    return "native" if pattern.density <= break_even(rows) else "unpacked"


def _chosen(backend: str | None, pattern: Pattern, first: jax.Array, second: jax.Array) -> str:
    if _compat.is_symbolic(*first.shape, *second.shape) or 0 in (*first.shape, *second.shape):
        return "xla"
    if backend == "native":
        calls.check(first, second)
    return backend or chosen(pattern, first.shape[0], first.dtype, second.dtype)
