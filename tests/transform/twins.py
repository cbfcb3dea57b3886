"""Twins: what a sparse backward must equal, written without the library.

`masked` is the identity whose cotangent is multiplied by the top-k mask of each group of rows: put on a layer's output,
plain JAX then computes exactly what the sparse rule claims to.
"""

import contextlib
import functools
import importlib
import itertools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import xla_metadata


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


def assert_trees_close(a, b, rtol=2e-5, floor=1e-30):
    """Assert that two pytrees agree up to the rounding of a sum, relative to their largest entry, or to `floor`."""
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def close(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(floor, np.abs(y).max(initial=0)))

    jax.tree.map(close, a, b)


NUMBERS = itertools.count()


@contextlib.contextmanager
def masked_contractions(k, group, probes):
    """Within it, every matrix product and convolution without batch axes masks the cotangent of its output.

    `probes` maps a right operand's shape to a pair of zeros, one for each output feature: what is added to the output
    above and below the mask, so that their gradients are the sums over rows of the cotangent before and after it.
    JAX's own functions are replaced, so that nothing of the library is needed. A mark that no other program has keeps
    apart what JAX traces here and what it has traced before.
    """
    internal = [importlib.import_module(f"jax._src.lax.{name}") for name in ("lax", "convolution")]
    plain_dot, plain_conv = internal[0].dot_general, internal[1].conv_general_dilated

    def marked(y, rows, shape):
        above, below = probes.get(shape, (0.0, 0.0))
        flat = y.reshape(rows, -1)
        return (masked(flat + below, k, group) + above).reshape(y.shape)

    def with_weight_first(y, lhs, free):
        out = jnp.moveaxis(y, range(free), range(-free, 0))
        rows = y.size // int(np.prod(y.shape[:free]))
        return jnp.moveaxis(marked(out, rows, lhs.shape), range(-free, 0), range(free))

    def dot(lhs, rhs, dimension_numbers, *args, **kwargs):
        y = plain_dot(lhs, rhs, dimension_numbers, *args, **kwargs)
        (contracted, _), (batch, _) = dimension_numbers
        if len(batch) or y.size == 0:
            return y
        if rhs.shape not in probes and lhs.shape in probes:
            return with_weight_first(y, lhs, lhs.ndim - len(contracted))
        return marked(y, int(np.prod(y.shape[: lhs.ndim - len(contracted)])), rhs.shape)

    def conv(lhs, rhs, *args, **kwargs):
        y = plain_conv(lhs, rhs, *args, **kwargs)
        return marked(y, y.size // y.shape[-1], rhs.shape)  # features last, as Flax has them

    einsum = functools.partial(jnp.einsum, _dot_general=dot)
    patches = [mock.patch.object(module, "dot_general", dot) for module in (internal[0], jax.lax)]
    patches += [mock.patch.object(module, "conv_general_dilated", conv) for module in (internal[1], jax.lax)]
    patches.append(mock.patch.object(jnp, "einsum", einsum))
    mark = xla_metadata.set_xla_metadata(twin=str(next(NUMBERS)))
    with contextlib.ExitStack() as stack, jax.numpy_rank_promotion("allow"), mark:
        for patch in patches:
            stack.enter_context(patch)
        yield {"dot_general": dot, "conv_general_dilated": conv, "einsum_op": einsum}
