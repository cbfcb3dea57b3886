"""The gradient of the structure against enumeration, its variance, and the projection against a solver."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from msbp_jax.subnetworks import _structure as structure

GATES = 5
EVERY = np.array(list(itertools.product([0, 1], repeat=GATES)), bool)


def losses(seed, mean=2.0):
    """Return a positive loss for every mask, as networks have them."""
    return mean + 0.4 * np.random.default_rng(seed).normal(size=len(EVERY))


def weights(s):
    """Return the probability of every mask, differentiably."""
    return jnp.where(EVERY, s, 1 - s).prod(axis=1)


def every_pair(s, loss, alpha):
    """Return the estimates of all pairs of masks `[pairs, gates]`, and their probabilities."""
    at = np.array(list(itertools.product(range(len(EVERY)), repeat=2)))
    of = lambda m, other, difference: structure.gradient({"g": s}, {"g": m}, {"g": other}, difference, alpha)["g"]
    found = jax.vmap(of)(EVERY[at[:, 0]], EVERY[at[:, 1]], jnp.asarray(loss[at[:, 0]] - loss[at[:, 1]]))
    p = np.asarray(weights(s), np.float64)
    return np.asarray(found, np.float64), p[at[:, 0]] * p[at[:, 1]]


def test_unbiased_with_ten_gates():
    """All pairs of 1,024 masks, a million."""
    gates = 10
    every = np.array(list(itertools.product([0, 1], repeat=gates)), bool)
    with jax.enable_x64(True):
        s = jnp.asarray(np.random.default_rng(3).uniform(0.05, 0.95, gates))
        loss = jnp.asarray(2 + np.random.default_rng(4).normal(size=len(every)))
        of_mask = lambda s: jnp.where(every, s[None], 1 - s[None]).prod(axis=1)
        p = of_mask(s)

        def mean_over_second(m, value):
            of = lambda other, theirs: structure.gradient({"g": s}, {"g": m}, {"g": other}, value - theirs, 0.5)["g"]
            return p @ jax.vmap(of)(jnp.asarray(every), loss)

        found = p @ jax.lax.map(lambda one: mean_over_second(*one), (jnp.asarray(every), loss), batch_size=64)
        want = jax.grad(lambda s: (of_mask(s) * loss).sum())(s) * jnp.sqrt(s * (1 - s))
        np.testing.assert_allclose(found, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_by_enumeration(alpha, seed):
    """For `(s (1 - s))^alpha` times the gradient of the mean loss."""
    with jax.enable_x64(True):
        s, loss = jnp.asarray(np.random.default_rng(seed).uniform(0.05, 0.95, GATES)), losses(seed)
        found, p = every_pair(s, loss, alpha)
        want = jax.grad(lambda s: (weights(s) * loss).sum())(s) * (s * (1 - s)) ** alpha
        np.testing.assert_allclose(p @ found, want, rtol=1e-9, atol=1e-12)
        assert p.sum() == pytest.approx(1)


def variance(values, p):
    return p @ (values - p @ values) ** 2


@pytest.mark.parametrize("seed", range(5))
def test_less_variance_than_without_a_baseline(seed):
    """REINFORCE of as many forwards, the mean of `L (m - s)` over two samples, of positive losses."""
    with jax.enable_x64(True):
        s, loss = jnp.asarray(np.random.default_rng(seed).uniform(0.05, 0.95, GATES)), losses(seed)
        found, p = every_pair(s, loss, 0.5)
        at = np.array(list(itertools.product(range(len(EVERY)), repeat=2)))
        score = (EVERY - np.asarray(s)) / np.sqrt(s * (1 - s))
        plain = (loss[:, None] * score)[at].mean(axis=1)
        np.testing.assert_allclose(p @ plain, p @ found, atol=1e-9)
        assert (variance(found, p) < variance(plain, p)).all()


def test_the_variance_is_bounded_at_a_half_and_not_at_0():
    with jax.enable_x64(True):
        loss = losses(0)
        at = {}
        for alpha in (0.5, 0.0):
            for edge in (1e-2, 1e-4, 1 - 1e-4):
                found, p = every_pair(jnp.full(GATES, 0.5).at[0].set(edge), loss, alpha)
                at[alpha, edge] = variance(found, p)[0]
        assert max(at[0.5, edge] for edge in (1e-2, 1e-4, 1 - 1e-4)) < 1
        assert at[0.0, 1e-4] > 50 * at[0.0, 1e-2]
        assert at[0.0, 1 - 1e-4] > 50 * at[0.0, 1e-2]


def test_certain_units_have_no_gradient():
    s = {"g": jnp.array([0.0, 1.0, 0.5])}
    m, other = ({"g": jnp.array(mask)} for mask in ([False, True, True], [False, True, False]))
    found = structure.gradient(s, m, other, jnp.float32(3), 0.5)["g"]
    np.testing.assert_allclose(found, [0, 0, 3], rtol=1e-6)
    assert np.isnan(structure.gradient(s, m, other, jnp.float32(np.nan), 0.5)["g"]).all()


@pytest.mark.parametrize(
    ("z", "budget", "want"),
    [
        ([-1e8, 0.9, 0.9, 0.3], 1.0, [0, 0.5, 0.5, 0]),
        ([1e8, 0.9, 0.9, 0.3], 1.5, [1, 0.25, 0.25, 0]),
        ([1e8, 0.9, 0.9, 0.3], 1.0, [1, 0, 0, 0]),
        ([3.0, 3.0], 1.0, [0.5, 0.5]),
        ([2.0], 0.5, [0.5]),
        ([0.2, 0.3], 2.0, [0.2, 0.3]),
    ],
)
def test_projections_with_outliers(z, budget, want):
    got = structure.projected({"g": jnp.asarray(z, jnp.float32)}, budget)["g"]
    np.testing.assert_allclose(got, want, atol=1e-6)


PROJECTED = jax.jit(structure.projected)  # a program for each size


@given(st.integers(2, 12), st.floats(0.05, 1.2), st.integers(0, 10_000), st.booleans())
def test_the_projection_is_the_nearest_point(size, share, seed, ties):
    draw = np.random.default_rng(seed)
    z = draw.normal(0.5, 0.8, size).astype(np.float32)
    z = np.round(z, 1) if ties else z
    budget = share * size
    cut = size // 2
    found = PROJECTED({"a": z[:cut], "b": z[cut:]}, budget)
    got = np.concatenate([found["a"], found["b"]])
    want = scipy.optimize.minimize(
        lambda s: ((s - z) ** 2).sum(), np.full(size, min(share, 1) / 2), jac=lambda s: 2 * (s - z), method="SLSQP",
        bounds=[(0, 1)] * size, constraints={"type": "ineq", "fun": lambda s: budget - s.sum()},
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    assert got.sum() <= budget * (1 + 1e-6)
    assert got.min() >= 0
    assert got.max() <= 1
    distance = lambda s: ((s - np.asarray(z, np.float64)) ** 2).sum()
    assert distance(got) <= distance(want.x) + 1e-5
    np.testing.assert_allclose(got, bisected(z, budget), atol=1e-6)


def bisected(z, budget):
    """Return the projection in float64, by halving an interval."""
    z, at = z.astype(np.float64), lambda v: np.clip(z.astype(np.float64) - v, 0, 1)
    if at(0).sum() <= budget:
        return at(0)
    low, high = 0.0, z.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > budget else (low, middle)
    return at(high)


@pytest.mark.parametrize("size", [1000, 30_000])
def test_large_projections(size):
    z = np.random.default_rng(0).normal(0.1, 0.3, size).astype(np.float32)
    for budget in (1.0, 0.05 * size, 0.5 * size):
        got = np.asarray(structure.projected({"g": jnp.asarray(z)}, budget)["g"])
        np.testing.assert_allclose(got, bisected(z, budget), atol=1e-6)


def test_draws_have_their_probabilities():
    s = {"b": jnp.array([0.0, 0.2, 0.9, 1.0]), "a": jnp.full(3, 0.5)}
    draws = jax.vmap(lambda key: structure.draw(s, key))(jax.random.split(jax.random.key(0), 4000))
    for name, masks in draws.items():
        np.testing.assert_allclose(masks.mean(axis=0), s[name], atol=0.03)
        inner = np.cov(np.asarray(masks).T)
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.02
    assert not draws["b"][:, 0].any()
    assert draws["b"][:, 3].all()
