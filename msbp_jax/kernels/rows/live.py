"""Which rows are not exactly 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from msbp_jax.kernels.native import calls
from msbp_jax.kernels.residual import takes_part


def live_rows(cotangent: Float[Array, "rows n"], *, backend: str | None = None) -> Float[Array, " rows"]:
    """Return 1 for each row with an entry that is not 0, and 0 for the others, float32.

    The native kernel looks no further into a row than its first such entry, so that it costs next to nothing where
    rows are not 0.

    Args:
      cotangent: `[rows, n]`.
      backend: "native" or "xla"; None to choose.
    """
    if backend != "xla":
        try:
            return _native(cotangent)
        except NotImplementedError:
            if backend == "native":
                raise
    return takes_part(cotangent)[:, 0].astype(jnp.float32)


def _native(cotangent: jax.Array) -> jax.Array:
    calls.check(cotangent)
    rows = cotangent.shape[0]
    (live,) = calls.call("live_rows", [cotangent], [((rows,), jnp.float32)], by="i n -> i")
    return jnp.minimum(live, 1)  # over devices that share a row's features it is a sum
