"""What `msbp.diagnose` sees of a backward pass: logs of the rules, under a key for each use of each site."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from msbp_jax import _compat


class Observer:
    """Names the logs of one differentiation.

    Args:
      kind: "sparse" to look at the backward as it is, "dense" to have a dense one in its place.
    """

    def __init__(self, kind: Literal["sparse", "dense"]) -> None:
        self.kind: Literal["sparse", "dense"] = kind
        self.sites: dict[str, str] = {}
        self._uses = itertools.count()

    def key(self, site: str) -> str:
        """Return a key for one more use of the site of that name; JAX wants strings, and sorts them."""
        key = f"msbp_jax/{next(self._uses):08d}/{site}"
        self.sites[key] = site
        return key


def branches_of(log: Any) -> list[tuple[dict[str, jax.Array], jax.Array]]:
    """Return a rule's log for every branch of the conds around it, each with whether it ran, over its leading axes."""
    branched = _compat.split_branch_log(log)
    if branched is None:
        return [(log, jnp.ones((), bool))]
    index, branches = branched
    flat: list[tuple[dict[str, jax.Array], jax.Array]] = []
    for number, branch in enumerate(branches):
        if branch is not None:
            flat.extend((inner, _and(index == number, ran)) for inner, ran in branches_of(branch))
    return flat


def _and(outer: jax.Array, inner: jax.Array) -> jax.Array:
    """Elementwise and of masks over leading axes; the one of lower rank lacks the inner loops' axes."""
    rank = max(outer.ndim, inner.ndim)
    return _spread(outer, rank) & _spread(inner, rank)


def _spread(mask: jax.Array, rank: int) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (rank - mask.ndim))
