"""Twins: what a sparse backward must equal, written without the library.

`masked` is the identity whose cotangent is multiplied by the top-k mask of each group of rows: put on a layer's output,
plain JAX then computes exactly what the sparse rule claims to.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np


def top_k_mask(u, k, group):
    """Return the mask (True = kept) of the k columns with the largest sum of magnitudes in each group of rows."""
    u = np.asarray(u, np.float64)
    mask = np.zeros(u.shape, bool)
    step = len(u) if group is None else group
    for start in range(0, len(u), step):
        score = np.abs(u[start : start + step]).astype(np.float32).sum(0)
        kept = np.argsort(-score, kind="stable")[:k]
        mask[start : start + step, kept] = True
    return mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def masked(y, k, group):
    return y


def _bwd(k, group, _, g):
    flat = g.reshape(-1, g.shape[-1])
    score = jnp.abs(flat)
    size = len(flat) if group is None else group
    pad = -len(flat) % size
    score = jnp.pad(score, ((0, pad), (0, 0))).reshape(-1, size, flat.shape[1]).sum(1)
    rank = jnp.argsort(jnp.argsort(-score, axis=1, stable=True), axis=1)
    mask = jnp.repeat(rank < k, size, axis=0)[: len(flat)]
    return (jnp.where(mask, flat, jnp.zeros((), flat.dtype)).reshape(g.shape),)


masked.defvjp(lambda y, k, group: (y, None), _bwd)


def assert_trees_equal(a, b):
    """Assert that two pytrees are the same bit for bit."""
    chex.assert_trees_all_equal(a, b, strict=True)


def assert_trees_close(a, b, rtol=2e-5):
    """Assert that two pytrees agree up to the rounding of a sum, relative to their largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def close(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(1e-30, np.abs(y).max()))

    jax.tree.map(close, a, b)
