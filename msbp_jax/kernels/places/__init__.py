"""The places of the largest of many numbers, of which only the run tells how many: `largest`.

| backend | |
|---|---|
| native | the k-th largest is found without sorting, on a CPU, float32 |
| xla | `lax.top_k` of as many as there can be |
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msbp_jax.kernels.native import calls


def largest(
    scores: Float[Array, " size"], count: Int[Array, ""], most: int, *, backend: str | None = None
) -> Int[Array, " most"]:
    """Return the places of the `count` largest scores that are 0 or more, ascending, ties to the first.

    Args:
      scores: Any floating dtype. What is negative or NaN is never taken.
      count: How many, int32; there may be fewer.
      most: How many there can be.
      backend: "native" or "xla"; None to choose.

    Returns:
      int32; `size` where there are no more.
    """
    if backend is None:
        native = scores.dtype == jnp.float32 and scores.size > 0 and most > 0 and calls.runs(scores.dtype)
        backend = "native" if native else "xla"
    if backend == "native":
        operands = [scores, count.astype(jnp.int32).reshape(1)]
        found: jax.Array = calls.call("largest", operands, [((most,), jnp.int32)])[0]
        return found
    size = scores.shape[0]
    ranked = jnp.where(scores >= 0, scores, -1.0)
    best, at = jax.lax.top_k(ranked, min(most, size))
    taken = (jnp.arange(len(at), dtype=jnp.int32) < count) & (best >= 0)
    places = jnp.sort(jnp.where(taken, at.astype(jnp.int32), size))
    return jnp.pad(places, (0, most - len(places)), constant_values=size)
