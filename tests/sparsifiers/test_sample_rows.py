"""Sampled rows: probabilities, numbers, variance, groups, metrics, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

U = random_gradient(0, 24, 16)
NORMS = np.linalg.norm(np.asarray(U, np.float64), axis=1)
DRAWS = 20_000


def start(sparsifier, u=U):
    return sparsifier.init(jax.ShapeDtypeStruct(u.shape, u.dtype))


@functools.cache
def compiled(sparsifier):
    """Return `apply`, and the weights of draws with many keys: one program each for all gradients of a shape."""

    def draws(u, state, keys, seen):
        return jax.vmap(lambda key: sparsifier.apply(u, state._replace(key=key), **seen)[0].weight)(keys)

    return jax.jit(sparsifier.apply), jax.jit(draws)


def once(sparsifier, u, seed=0, **seen):
    """Return the weight of each row, and the state after, of one draw."""
    p, state = compiled(sparsifier)[0](u, start(sparsifier, u)._replace(key=jax.random.key(seed)), **seen)
    return np.asarray(p.weight), state


def many(sparsifier, u=U, draws=DRAWS, **seen):
    """Return the weight of each row in each of many draws with keys of their own."""
    return np.asarray(
        compiled(sparsifier)[1](u, start(sparsifier, u), jax.random.split(jax.random.key(7), draws), seen)
    )


def worth(scores, p):
    return (scores**2).sum() / (scores**2 / p).sum()


def probabilities(scores, efficiency=None, count=None):
    """Return the smallest p = min(1, s~ / t) that are worth an efficiency, or of a sum, by bisection in float64."""
    floored = 0.9 * scores + 0.1 * scores.mean()
    low, high = 1e-9 * floored.min(), 1e9 * floored.max()
    for _ in range(200):
        t = (low * high) ** 0.5
        p = np.minimum(1, floored / t)
        enough = p.sum() >= count if efficiency is None else worth(scores, p) >= efficiency
        low, high = (t, high) if enough else (low, t)
    return np.minimum(1, floored / low)


AMOUNTS = {
    "efficiency .95": ({"efficiency": 0.95}, {"efficiency": 0.95}),
    "efficiency .5": ({"efficiency": 0.5}, {"efficiency": 0.5}),
    "efficiency .1": ({"efficiency": 0.1}, {"efficiency": 0.1}),
    "density .25": ({"density": 0.25}, {"count": 6}),
    "count 11": ({"count": 11}, {"count": 11}),
    "count 1": ({"count": 1}, {"count": 1}),
}
amounts = pytest.mark.parametrize(("given", "meant"), AMOUNTS.values(), ids=AMOUNTS)


@amounts
def test_each_row_is_kept_with_its_probability(given, meant):
    p = probabilities(NORMS, **meant)
    hits = (many(msbp.sample_rows(**given)) != 0).sum(axis=0)
    assert (hits[p == 1] == DRAWS).all()
    tails = [scipy.stats.binomtest(int(hit), DRAWS, share).pvalue for hit, share in zip(hits, p, strict=True)]
    assert min(tails) > 1e-3 / len(tails)


@amounts
def test_a_kept_row_counts_by_its_probability(given, meant):
    weight = many(msbp.sample_rows(**given), draws=1000)
    want = np.where(weight != 0, 1 / probabilities(NORMS, **meant), 0)
    np.testing.assert_allclose(weight, want, rtol=2e-5)


@amounts
def test_the_number_is_the_sum_of_the_probabilities_rounded_down_or_up(given, meant):
    numbers = (many(msbp.sample_rows(**given), draws=2000) != 0).sum(axis=1)
    expected = probabilities(NORMS, **meant).sum()
    if "count" in meant:
        assert set(numbers) == {meant["count"]}
    else:
        assert set(numbers) <= {int(np.floor(expected)), int(np.ceil(expected))}
        assert numbers.mean() == pytest.approx(expected, abs=0.06)  # five standard errors at most


@pytest.mark.parametrize("rows", [2, 100, 3000])
@pytest.mark.parametrize("seed", range(3))
def test_exactly_so_many_rows_however_many_there_are(rows, seed):
    u = random_gradient(seed, rows, 3)
    for count in {1, rows // 7 + 1, rows - 1, rows}:
        assert (once(msbp.sample_rows(count=count), u, seed)[0] != 0).sum() == count


@pytest.mark.parametrize("efficiency", [0.05, 0.3, 0.6, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_worth_what_is_asked_for_and_no_more(efficiency, seed):
    u = random_gradient(seed, 300, 4)
    scores = np.linalg.norm(np.asarray(u, np.float64), axis=1)
    weight = many(msbp.sample_rows(efficiency=efficiency), u, draws=400).max(axis=0)
    p = 1 / np.where(weight == 0, np.inf, weight)
    seen = p > 0
    p[~seen] = probabilities(scores, efficiency=efficiency)[~seen]
    assert worth(scores, p) >= efficiency * (1 - 1e-6)
    assert worth(scores, np.where(p < 1, 0.999 * p, p)) < efficiency
    said = once(msbp.sample_rows(efficiency=efficiency), u)[1].efficiency
    assert float(said) == pytest.approx(worth(scores, p), rel=1e-5)


@pytest.mark.parametrize("efficiency", [0.3, 0.8, 0.95])
def test_the_variance_is_that_of_a_batch_e_times_as_large(efficiency):
    """E |S(g) - g|^2 = sum s^2 (1/p - 1) = (1/e - 1) sum s^2."""
    weight = many(msbp.sample_rows(efficiency=efficiency)).astype(np.float64)
    measured = ((weight - 1) ** 2 @ NORMS**2).mean()
    assert measured == pytest.approx((1 / efficiency - 1) * (NORMS**2).sum(), rel=0.1)


def test_the_variance_of_the_weight_s_gradient():
    weight = many(msbp.sample_rows(efficiency=0.8)).astype(np.float64)
    x = np.asarray(random_gradient(3, 24, 500), np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    gram = (x @ x.T) * (np.asarray(U, np.float64) @ np.asarray(U, np.float64).T)
    measured = np.einsum("di,ij,dj->d", weight - 1, gram, weight - 1).mean()
    assert measured == pytest.approx((1 / 0.8 - 1) * (NORMS**2).sum(), rel=0.1)


def test_the_floor_bounds_every_weight():
    u = jnp.concatenate([U[:4], 1e-6 * U[4:]])
    weight = many(msbp.sample_rows(count=6), u, draws=2000)
    scores = np.linalg.norm(np.asarray(u, np.float64), axis=1)
    assert weight.max() <= scores.size / (0.1 * 2)  # 2 rows beside the 4 large ones share out the rest


def test_groups_are_kept_or_left_out_together():
    sparsifier = msbp.sample_rows(count=2, rows_per_group=7)
    weight = many(sparsifier, draws=3000)
    groups = [weight[:, start : start + 7] for start in range(0, 24, 7)]
    assert [group.shape[1] for group in groups] == [7, 7, 7, 3]
    for group in groups:
        np.testing.assert_array_equal(group, np.broadcast_to(group[:, :1], group.shape))
    norms = np.array([np.linalg.norm(NORMS[start : start + 7]) for start in range(0, 24, 7)])
    kept = np.stack([group[:, 0] for group in groups], axis=1)
    np.testing.assert_allclose(kept, np.where(kept != 0, 1 / probabilities(norms, count=2), 0), rtol=2e-5)
    assert (np.count_nonzero(kept, axis=1) == 2).all()


def test_a_row_of_zeros_within_a_group_counts_nothing():
    weight, state = once(msbp.sample_rows(count=4, rows_per_group=6), U.at[3].set(0))
    assert weight[3] == 0
    assert np.count_nonzero(weight) == 23
    assert float(state.kept) == 23


def test_all_rows_of_an_example():
    """A row of dw is a row of the gradient, as the inputs are rows of the identity."""
    f = msbp.sparse_vjp(lambda w, x: x @ w, {"*": msbp.sample_rows(count=1, rows_per_group="example")})
    w, x = random_gradient(0, 12, 64), jnp.eye(12).reshape(3, 4, 12)
    loss = lambda w, m: jnp.sin(f(w, x, memory=m)).sum()
    dw = np.asarray(msbp.value_and_grad(loss)(w, f.init_memory(w, x))[1])
    kept = dw.any(axis=1).reshape(3, 4)
    assert sorted(kept.sum(axis=1)) == [0, 0, 4]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("given", [{"efficiency": 0.6}, {"count": 8}], ids=str)
def test_a_row_that_is_not_finite_is_kept_as_it_is(bad, given):
    weight = many(msbp.sample_rows(**given), U.at[5, 3].set(bad), draws=500)
    assert (weight[:, 5] == 1).all()
    rest = {"count": 7} if "count" in given else given
    others = np.delete(weight, 5, axis=1)
    want = 1 / probabilities(np.delete(NORMS, 5), **rest)
    np.testing.assert_allclose(others, np.where(others != 0, want, 0), rtol=2e-5)


def test_a_bad_row_spoils_no_other():
    sparsifier = msbp.sample_rows(count=8)
    p, state = compiled(sparsifier)[0](U.at[5, 3].set(jnp.nan), start(sparsifier))
    bad = ~np.isfinite(np.asarray(p.materialize())).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(bad), [5])
    assert all(np.isfinite(value) for value in state.metrics.values())


def test_a_bad_row_makes_its_group_certain():
    weight = many(msbp.sample_rows(count=2, rows_per_group=4), U.at[5, 3].set(jnp.nan), draws=50)
    assert (weight[:, 4:8] == 1).all()


every_amount = pytest.mark.parametrize("given", [{"efficiency": 0.9}, {"efficiency": 1}, {"density": 0.5}], ids=str)


@every_amount
@pytest.mark.parametrize("rows", [1, 12])
def test_zeros_stay_zeros(given, rows):
    sparsifier = msbp.sample_rows(**given)
    p, state = compiled(sparsifier)[0](jnp.zeros((rows, 4)), start(sparsifier, jnp.zeros((rows, 4))))
    assert not np.asarray(p.materialize()).any()
    assert not np.asarray(p.weight).any()
    assert {name: float(value) for name, value in state.metrics.items()} == {"efficiency": 1, "density": 0, "count": 0}


@every_amount
def test_one_row_is_kept(given):
    weight, state = once(msbp.sample_rows(**given), U[:1])
    if "efficiency" in given and given["efficiency"] < 1:
        weight = many(msbp.sample_rows(**given), U[:1], draws=4000)
        assert weight.mean() == pytest.approx(1, abs=5 * (1 / 0.9 - 1) ** 0.5 / 4000**0.5)
    else:
        np.testing.assert_array_equal(weight, [1])
    assert float(state.steps) == 1


@every_amount
def test_no_rows(given):
    weight, state = once(msbp.sample_rows(**given), U[:0])
    assert weight.shape == (0,)
    assert {name: float(value) for name, value in state.metrics.items()} == {"efficiency": 1, "density": 0, "count": 0}


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e25, 1e36])
@pytest.mark.parametrize("group", [1, 5])
def test_squares_neither_underflow_nor_overflow(scale, group):
    sparsifier = msbp.sample_rows(efficiency=0.8, rows_per_group=group)
    np.testing.assert_allclose(once(sparsifier, scale * U)[0], once(sparsifier, U)[0], rtol=1e-4)


def test_rows_too_small_for_xla_are_kept():
    weight, _ = once(msbp.sample_rows(efficiency=0.8), jnp.full((6, 4), 1e-42))
    assert np.isfinite(weight).all()
    assert weight.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_by_float32_scores(dtype):
    u = (100 * U).astype(dtype)  # in float16 its squares would overflow
    scores = np.linalg.norm(np.asarray(u, np.float64), axis=1)
    weight = once(msbp.sample_rows(count=9), u)[0]
    np.testing.assert_allclose(weight, np.where(weight != 0, 1 / probabilities(scores, count=9), 0), rtol=2e-5)


def test_efficiency_1_leaves_out_nothing_but_rows_of_zeros():
    sparsifier = msbp.sample_rows(efficiency=1)
    u = U.at[2:5].set(0)
    p, _ = compiled(sparsifier)[0](u, start(sparsifier))
    np.testing.assert_array_equal(p.materialize(), u)
    np.testing.assert_array_equal(np.flatnonzero(p.weight == 0), [2, 3, 4])


def test_no_more_rows_than_are_asked_for_are_kept_whole():
    weight, _ = once(msbp.sample_rows(count=6), U.at[5:].set(0))
    np.testing.assert_array_equal(weight, np.arange(24) < 5)


def test_rows_that_are_alike_are_drawn_alike():
    weight = many(msbp.sample_rows(efficiency=0.75), jnp.ones((16, 3)), draws=500)
    assert set(np.count_nonzero(weight, axis=1)) <= {12, 13}
    np.testing.assert_allclose(weight[weight != 0], 4 / 3, rtol=1e-4)


def test_scores_by_the_product_with_the_norms_of_inputs():
    norms = np.exp(np.random.default_rng(1).normal(size=24)).astype(np.float32)
    sparsifier = msbp.sample_rows(count=9, scores="product")
    assert sparsifier.wants == ("input_norms",)
    weight, _ = once(sparsifier, U, input_norms=jnp.asarray(norms))
    want = 1 / probabilities(NORMS * norms, count=9)
    np.testing.assert_allclose(weight, np.where(weight != 0, want, 0), rtol=2e-5)


def test_each_step_draws_with_another_key():
    sparsifier = msbp.sample_rows(count=6, key=jax.random.key(3))
    state, seen = start(sparsifier), []
    for _ in range(6):
        p, state = compiled(sparsifier)[0](U, state)
        seen.append(tuple(np.flatnonzero(p.weight)))
    assert len(set(seen)) > 1


def test_metrics_are_means_of_some_ten_steps():
    sparsifier = msbp.sample_rows(efficiency=0.8)
    state, counts = start(sparsifier), []
    assert {float(value) for value in state.metrics.values()} == {0}
    for _ in range(4):
        p, state = compiled(sparsifier)[0](U, state)
        counts.append(np.count_nonzero(p.weight))
    told = {name: float(value) for name, value in state.metrics.items()}
    assert told["count"] == pytest.approx(np.mean(counts), rel=1e-6)
    assert told["density"] == pytest.approx(np.mean(counts) / 24, rel=1e-6)
    assert told["efficiency"] == pytest.approx(0.8, rel=1e-4)
    _, later = compiled(sparsifier)[0](U, state._replace(kept=jnp.asarray(10.0), steps=jnp.asarray(100.0)))
    assert float(later.kept) == pytest.approx(10 + (float(np.count_nonzero(p.weight)) - 10) / 10, abs=0.11)


def test_names():
    assert repr(msbp.sample_rows(efficiency=0.95)) == "sample_rows(efficiency=0.95)"
    assert repr(msbp.sample_rows(count=3, rows_per_group=4)) == "sample_rows(count=3, rows_per_group=4)"
    named = 'sample_rows(density=0.5, rows_per_group="example", scores="product")'
    assert repr(msbp.sample_rows(density=0.5, rows_per_group="example", scores="product")) == named


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"takes one of efficiency=, density= and count=, got none of them\. Write"),
        ({"density": 0.1, "count": 3}, ValueError, r"takes one of .*, got density=0\.1 and count=3"),
        ({"efficiency": 0.9, "count": 3}, ValueError, r"got efficiency=0\.9 and count=3"),
        (
            {"efficiency": 0.0},
            ValueError,
            r"efficiency must lie in \(0, 1\] \(what the kept rows are worth\), got 0\.0",
        ),
        ({"efficiency": 1.01}, ValueError, r"efficiency must lie in \(0, 1\].*got 1\.01"),
        ({"efficiency": float("nan")}, ValueError, r"efficiency must lie in \(0, 1\].*got nan"),
        ({"efficiency": "all"}, TypeError, r"efficiency must be a number in \(0, 1\].*got 'all'"),
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\] \(share of the rows kept\), got 0\.0"),
        ({"density": -0.5}, ValueError, r"density must lie in \(0, 1\].*got -0\.5"),
        ({"count": 0}, ValueError, r"count must be at least 1 \(groups of rows kept\), got 0"),
        ({"count": 2.5}, TypeError, r"count must be an integer .*got 2\.5"),
        ({"count": 3, "rows_per_group": None}, ValueError, r"rows_per_group=None would be one group of all rows"),
        ({"count": 3, "rows_per_group": 0}, ValueError, r"rows_per_group must be at least 1 .*got 0"),
        ({"count": 3, "scores": "loss"}, ValueError, r"scores must be \"norm\" .* or \"product\" .*got 'loss'"),
        ({"count": 3, "key": 3}, TypeError, r"key must be one typed PRNG key such as jax\.random\.key\(0\), got"),
        ({"count": 3, "key": jnp.zeros(2, jnp.uint32)}, TypeError, "key must be one typed PRNG key"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        msbp.sample_rows(**arguments)


def test_a_count_above_the_rows():
    with pytest.raises(ValueError, match=r"count=25 is more than the 24 rows that there are\. Give a smaller count"):
        start(msbp.sample_rows(count=25))
    with pytest.raises(ValueError, match=r"count=6 is more than the 5 groups of 5 rows that there are"):
        start(msbp.sample_rows(count=6, rows_per_group=5))
