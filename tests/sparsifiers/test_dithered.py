"""Entries made 0 by chance: unbiased, with the variance that the formula says, levels that fit, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax.testing import random_gradient

U = random_gradient(0, 12, 20)
DRAWS = 20_000
EVERY = {
    "dithered": msbp.dithered(1.5),
    "dithered 8 bits": msbp.dithered(1.0, bits=8),
    "sample_entries": msbp.sample_entries(0.2),
    "stochastic_prune": msbp.stochastic_prune(0.8),
}
every = pytest.mark.parametrize("sparsifier", EVERY.values(), ids=EVERY)


def start(sparsifier, u=U):
    return sparsifier.init(jax.ShapeDtypeStruct(u.shape, u.dtype))


@functools.cache
def compiled(sparsifier):
    return jax.jit(sparsifier.apply)


def once(sparsifier, u, seed=0):
    """Return p and the state after, of one draw."""
    return compiled(sparsifier)(u, start(sparsifier, u)._replace(key=jax.random.key(seed)))


def many(sparsifier, u=U, draws=DRAWS):
    """Return p of each of many draws with keys of their own, in float64."""
    state = start(sparsifier, u)
    draw = lambda key: sparsifier.apply(u, state._replace(key=key))[0].materialize()
    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(7), draws)), np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every
def test_unbiased_in_16_bits(sparsifier, dtype):
    """Levels are exact there, and thresholds are rounded before anything is drawn by them."""
    u = U.astype(dtype)
    state = start(sparsifier, u)

    def draw(key):
        p = sparsifier.apply(u, state._replace(key=key))[0]
        return p.values.astype(jnp.float32) * p.scale_or_one()

    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), DRAWS)), np.float64)
    error = np.abs(draws.mean(0) - np.asarray(u, np.float64))
    assert (error <= 4.5 * draws.std(0) / DRAWS**0.5 + 7 * np.abs(draws).max() / DRAWS).all()


def test_the_variance_of_dithering_is_what_the_formula_says():
    scale = 1.5
    step = scale * np.asarray(U, np.float64)[np.asarray(U).any(1)].std()
    draws = many(EVERY["dithered"])
    f = np.asarray(U, np.float64) / step % 1
    want = step**2 * f * (1 - f)
    # Each entry is one of two levels: the sum of squares of so many draws, standardised, is normal to three digits.
    z = (draws.var(0) - want) / np.sqrt(np.maximum(want * (step**2 - 4 * want), 1e-12) / DRAWS)
    often = DRAWS * np.minimum(f, 1 - f) > 100
    assert often.sum() > 60
    assert scipy.stats.kstest(z[often], "norm").pvalue > 1e-3
    assert abs(draws.var(0).sum() / want.sum() - 1) < 0.01


def test_levels_fit_their_probabilities():
    """A chi-square over entries: how often each went up, and that nothing but the two levels next to it comes."""
    step = 1.5 * float(kernels.spread(U))
    levels = np.round(many(EVERY["dithered"]) / step)
    below = np.floor(np.asarray(U, np.float64) / step)
    assert np.isin(levels - below, (0, 1)).all()
    up, f = (levels - below).mean(0), np.asarray(U, np.float64) / step - below
    often = DRAWS * np.minimum(f, 1 - f) > 20
    chi = ((up - f) ** 2 / (f * (1 - f) / DRAWS))[often]
    assert 1e-4 < scipy.stats.chi2.sf(chi.sum(), chi.size) < 1 - 1e-4


@pytest.mark.parametrize(("scale", "zeros"), [(1, 0.37), (2, 0.61), (4, 0.80), (8, 0.90)])
def test_the_zeros_of_a_normal_gradient(scale, zeros):
    u = jax.random.normal(jax.random.key(0), (300, 400))
    p, state = once(msbp.dithered(scale), u)
    z = scipy.stats.norm
    grid = np.linspace(-scale, scale, 20001)
    expected = np.trapezoid((1 - np.abs(grid) / scale) * z.pdf(grid), grid)
    assert expected == pytest.approx(zeros, abs=0.006)
    assert 1 - float(p.share) == pytest.approx(expected, abs=0.006)
    assert float(msbp.metrics(state)["density"]) == pytest.approx(float(p.share))


def test_draws_of_a_key_are_the_same_and_of_others_are_not():
    first, second = (np.asarray(once(msbp.dithered(2), U, seed)[0].values) for seed in (0, 1))
    np.testing.assert_array_equal(first, once(msbp.dithered(2), U, 0)[0].values)
    assert not np.array_equal(first, second)
    key = jax.random.key(5)
    assert start(msbp.dithered(2, key=key)).key == key


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_gradient_without_spread_is_passed_on_exactly(value, bits):
    u = jnp.full((6, 9), value).at[2].set(0)
    np.testing.assert_array_equal(once(msbp.dithered(3, bits=bits), u)[0].materialize(), u)
    one = jnp.full((1, 1), value)
    np.testing.assert_array_equal(once(msbp.dithered(3, bits=bits), one)[0].materialize(), one)


@every
def test_rows_of_zeros_take_no_part(sparsifier):
    p, _ = once(sparsifier, U)
    padded = jnp.concatenate([U, jnp.zeros((30, 20))])
    q, _ = once(sparsifier, padded)
    np.testing.assert_allclose(q.materialize()[:12], p.materialize(), rtol=1e-5)
    assert not np.asarray(q.materialize()[12:]).any()


@every
def test_no_rows(sparsifier):
    p, state = once(sparsifier, U[:0])
    assert p.materialize().shape == (0, 20)
    assert all(np.isfinite(np.asarray(value)).all() for value in msbp.metrics(state).values())


@pytest.mark.parametrize("name", ["dithered", "sample_entries", "stochastic_prune"])
def test_what_is_not_finite_is_passed_on_and_never_in_the_state(name):
    u = U.at[3, 4].set(jnp.nan).at[5, 6].set(jnp.inf).at[7, 8].set(-jnp.inf)
    p, state = once(EVERY[name], u)
    got = np.asarray(p.materialize())
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(np.asarray(u)))
    np.testing.assert_array_equal(got[~np.isfinite(got)], np.asarray(u)[~np.isfinite(got)])
    assert all(np.isfinite(np.asarray(value)).all() for value in msbp.metrics(state).values())


@pytest.mark.parametrize("worst", [jnp.nan, jnp.inf])
def test_in_8_bits_what_is_not_finite_makes_all_nan(worst):
    p, state = once(msbp.dithered(1, bits=8), U.at[3, 4].set(worst))
    assert np.isnan(np.asarray(p.scale))
    assert np.isnan(np.asarray(kernels.grad_input(p, jnp.ones((5, 20)), 1))).all()
    assert all(np.isfinite(np.asarray(value)).all() for value in msbp.metrics(state).values())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
@every
def test_gradients_of_any_size(sparsifier, scale):
    u = U / 2**7  # so that rounding is the same for all powers of 2
    size = 2.0 ** round(np.log2(scale))
    p, q = once(sparsifier, u)[0].materialize(), once(sparsifier, u * size)[0].materialize()
    np.testing.assert_allclose(np.asarray(q) / size, p, rtol=1e-4)


def test_a_threshold_that_float16_does_not_hold_leaves_all_as_it_is():
    u = (2000 * jax.random.normal(jax.random.key(0), (8, 9))).astype(jnp.float16)
    np.testing.assert_array_equal(once(msbp.sample_entries(0.001), u)[0].materialize(), u)


def test_levels_that_float16_does_not_hold_end_at_its_largest():
    u = jnp.full((4, 50), 0.001, jnp.float16).at[0, 0].set(100.0)
    p, _ = once(msbp.dithered(1e-6), u)
    assert np.isfinite(np.asarray(p.values, np.float32)).all()
    q, _ = once(msbp.dithered(1e-6, bits=8), u)
    assert np.isfinite(float(q.scale))
    assert int(q.values[0, 0]) == 127


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_levels_are_clipped_and_counted(bits, most):
    u = jnp.concatenate([jax.random.normal(jax.random.key(0), (40, 25)), jnp.full((1, 25), 30.0)])
    sparsifier = msbp.dithered(0.02, bits=bits)
    p, state = once(sparsifier, u)
    assert p.values.dtype == jnp.int8
    assert np.abs(np.asarray(p.values, int)).max() == most
    step = float(p.scale)
    certain, possible = np.abs(u) / step > most + 1, np.abs(u) / step > most
    assert certain.sum() <= float(msbp.metrics(state)["clipped"]) <= possible.sum()
    inside = ~np.asarray(possible)
    assert np.abs(np.asarray(p.materialize()) - np.asarray(u))[inside].max() <= step * 1.001
    assert float(msbp.metrics(once(msbp.dithered(4, bits=bits), U)[1])["clipped"]) == 0


def test_8_bits_are_the_levels_of_the_floats():
    p, q = once(msbp.dithered(2), U)[0], once(msbp.dithered(2, bits=8), U)[0]
    np.testing.assert_allclose(q.materialize(), p.materialize(), rtol=1e-6)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.7])
def test_as_many_entries_as_are_asked_for_and_no_smaller_variance(density):
    u = jnp.concatenate([U, jnp.zeros((3, 20))])
    draws = many(msbp.sample_entries(density), u, 4000)
    kept = (draws != 0).mean(0)
    counts = (draws != 0).sum((1, 2))
    wanted = density * U.size
    assert abs(counts.mean() - wanted) < 4.5 * counts.std() / 4000**0.5 + 1e-3
    g = np.abs(np.asarray(u, np.float64))
    t = np.abs(draws).max(0)[(kept > 0) & (kept < 1)].min()
    p = np.minimum(1, g / t)
    assert p.sum() == pytest.approx(wanted, rel=1e-4)
    assert (np.abs(kept - p) <= 4.5 * np.sqrt(p * (1 - p) / 4000) + 1e-3).all()
    variance = lambda p: np.where(g > 0, g**2 * (1 / np.maximum(p, 1e-300) - 1), 0).sum()
    for other in (np.where(g > 0, density, 0), np.minimum(1, p * np.random.default_rng(0).uniform(0.5, 1.5, p.shape))):
        assert variance(p) < variance(other * wanted / other.sum() + 1e-12) * 1.0001


def test_all_entries():
    np.testing.assert_array_equal(once(msbp.sample_entries(1.0), U)[0].materialize(), U)
    few = jnp.zeros((4, 5)).at[0, 0].set(2.0).at[1, 1].set(-3.0)  # fewer than are asked for
    np.testing.assert_array_equal(once(msbp.sample_entries(0.5), few)[0].materialize(), few)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_pruned_entries_are_0_or_the_threshold_or_as_they_were(rate):
    u = jax.random.normal(jax.random.key(0), (200, 150))
    p = np.asarray(once(msbp.stochastic_prune(rate), u)[0].materialize())
    g = np.asarray(u)
    t = scipy.stats.norm.ppf((1 + rate) / 2) * np.sqrt(np.pi / 2) * np.abs(g).mean()
    below = np.abs(g) < t * (1 - 1e-5)
    assert below.mean() == pytest.approx(rate, abs=0.01)
    np.testing.assert_array_equal(p[np.abs(g) > t * (1 + 1e-5)], g[np.abs(g) > t * (1 + 1e-5)])
    small = p[below]
    assert (np.isclose(np.abs(small), t, rtol=1e-5) | (small == 0)).all()
    assert (small * g[below] >= 0).all()


@pytest.mark.parametrize(
    ("factory", "arguments", "error", "message"),
    [
        (msbp.dithered, {"scale": 0}, ValueError, r"scale must be positive and finite .* got 0\. msbp\.dense\(\)"),
        (msbp.dithered, {"scale": -1.5}, ValueError, "scale must be positive and finite .* got -1.5"),
        (msbp.dithered, {"scale": float("inf")}, ValueError, "scale must be positive and finite .* got inf"),
        (msbp.dithered, {"scale": float("nan")}, ValueError, "scale must be positive and finite .* got nan"),
        (msbp.dithered, {"scale": "4"}, TypeError, "scale must be a number .* got '4'"),
        (msbp.dithered, {"scale": True}, TypeError, "scale must be a number .* got True"),
        (
            msbp.dithered,
            {"scale": 4, "bits": 16},
            ValueError,
            "bits must be 8, 4, or None for products of floats, got 16",
        ),
        (msbp.dithered, {"scale": 4, "bits": True}, ValueError, "bits must be 8, 4, or None .* got True"),
        (msbp.dithered, {"scale": 4, "key": 3}, TypeError, "key must be one typed PRNG key"),
        (msbp.sample_entries, {"density": 0}, ValueError, r"density must lie in \(0, 1\] .* got 0"),
        (msbp.sample_entries, {"density": 1.5}, ValueError, r"density must lie in \(0, 1\] .* got 1\.5"),
        (msbp.sample_entries, {"density": None}, TypeError, r"density must be a number in \(0, 1\]"),
        (msbp.stochastic_prune, {"rate": 0}, ValueError, r"rate must lie in \(0, 1\) .* got 0\. msbp\.dense\(\)"),
        (msbp.stochastic_prune, {"rate": 1.0}, ValueError, r"rate must lie in \(0, 1\) .* got 1"),
        (msbp.stochastic_prune, {"rate": 1 - 2**-53}, ValueError, r"rate must lie in \(0, 1\)"),
        (msbp.dithered, {"scale": 10**400}, ValueError, "scale must be positive and finite"),
        (msbp.dithered, {"scale": 4, "bits": 8.0}, ValueError, r"bits must be 8, 4, or None .* got 8\.0"),
        (msbp.stochastic_prune, {"rate": "a"}, TypeError, r"rate must be a number .* got 'a'"),
    ],
)
def test_bad_arguments(factory, arguments, error, message):
    with pytest.raises(error, match=message):
        factory(**arguments)


@pytest.mark.parametrize("name", ["dithered", "sample_entries", "stochastic_prune"])
def test_nothing_is_left_to_remember(name):
    with pytest.raises(ValueError, match=r"nothing is left to remember"):
        msbp.memorized(EVERY[name], decay=0.5)


def test_numbers_of_numpy_are_numbers():
    assert msbp.dithered(np.float32(4)) == msbp.dithered(4)
    assert msbp.stochastic_prune(np.float64(0.5)) == msbp.stochastic_prune(0.5)
