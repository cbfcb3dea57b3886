"""The recursion u = g + m, p = S(u), m' = decay R(u - p), against its definition; what never enters the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import top_k_mask

import msbp_jax as msbp
from msbp_jax.testing import random_gradient


def states(sparsifier, gradients):
    state = sparsifier.init(jax.ShapeDtypeStruct(gradients[0].shape, gradients[0].dtype))
    for g in gradients:
        p, state = sparsifier.apply(g, state)
        yield np.asarray(p.materialize(), np.float64), np.asarray(state.residual, np.float64)


@pytest.mark.parametrize("reduce", ["mean", "slot"])
@pytest.mark.parametrize("group", [1, 4, 5, None])
def test_recursion(reduce, group):
    gradients = [random_gradient(seed, 12, 40) for seed in range(5)]
    sparsifier = msbp.memorized(msbp.top_k(k=6, rows_per_group=group), decay=0.7, reduce=reduce)
    m = np.zeros((40,) if reduce == "mean" else (12, 40))
    for g, (p, residual) in zip(gradients, states(sparsifier, gradients), strict=True):
        u = np.asarray(g, np.float64) + m
        want = np.where(top_k_mask(u, 6, group), u, 0)
        m = 0.7 * (u - want)
        m = m.mean(0) if reduce == "mean" else m
        np.testing.assert_allclose(p, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(residual, m, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "inner", [msbp.top_k(k=6, rows_per_group=5), msbp.random_k(k=6, rescale=True, rows_per_group=4)]
)
@pytest.mark.parametrize("reduce", ["mean", "slot"])
def test_conservation(inner, reduce):
    """With decay 1 what was propagated and what is remembered make up all there was."""
    gradients = [random_gradient(seed, 12, 40) for seed in range(9)]
    pairs = list(states(msbp.memorized(inner, decay=1.0, reduce=reduce), gradients))
    total = sum(p for p, _ in pairs)
    truth = sum(np.asarray(g, np.float64) for g in gradients)
    left = pairs[-1][1]
    if reduce == "mean":
        total, truth = total.mean(0), truth.mean(0)
    np.testing.assert_allclose(total + left, truth, atol=1e-5 * np.abs(total).max())


def test_decay_0_and_identity_need_no_memory():
    s = msbp.top_k(k=3)
    assert msbp.memorized(s, decay=0) is s
    assert msbp.memorized(s, decay=0.0, reduce="slot") is s
    stays = msbp.memorized(msbp.dense(), decay=0.5).at(msbp.Where(rows=2, n=80, m=4, dtype=jnp.float32))
    assert stays == msbp.Stays("dense() keeps all 80 features", by_choice=True)


@pytest.mark.parametrize("reduce", ["mean", "slot"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("k", [2, 20])
def test_non_finite_entries_are_propagated_and_remembered_as_0(bad, reduce, k):
    g = random_gradient(0, 8, 40).at[3, 7].set(bad).at[5, 11].set(bad).at[5, 12].set(bad)
    s = msbp.memorized(msbp.top_k(k=k, rows_per_group=4), decay=1.0, reduce=reduce)
    p, state = s.apply(g, s.init(g))
    residual = np.asarray(state.residual)
    assert np.isfinite(residual).all()
    dense = np.asarray(p.materialize())
    assert not np.isfinite(dense[3, 7])
    assert not np.isfinite(dense[5, 11])
    finite = np.isfinite(np.asarray(g)) & (dense == 0)
    want = np.where(finite, np.asarray(g), 0)
    np.testing.assert_allclose(residual, want.mean(0) if reduce == "mean" else want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_memory_is_float32_for_half_precision(dtype):
    g = random_gradient(0, 8, 40).astype(dtype)
    s = msbp.memorized(msbp.top_k(k=4), decay=0.5)
    p, state = s.apply(g, s.init(jax.ShapeDtypeStruct(g.shape, g.dtype)))
    assert p.values.dtype == dtype
    assert state.residual.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((msbp.top_k(k=1), 1.5), ValueError, r"decay must lie in \[0, 1\] \(share of the residual.*got 1\.5"),
        ((msbp.top_k(k=1), -0.1), ValueError, r"decay must lie in \[0, 1\].*got -0\.1"),
        ((msbp.top_k(k=1), "x"), TypeError, r"decay must be a number in \[0, 1\].*got 'x'"),
        ((0.5, 0.5), TypeError, r"memorized wraps a Sparsifier such as .*, got 0\.5"),
        ((msbp.top_k(k=1), 0.5, "sum"), ValueError, r'reduce must be "mean" .*, "slot" .* or "local" .*, got \'sum\''),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        msbp.memorized(*arguments[:2], **({"reduce": arguments[2]} if len(arguments) > 2 else {}))
