"""One contract over every sparsifier, in every way it is used."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from twins import assert_trees_close

import msbp_jax as msbp
from msbp_jax.testing import check_sparsifier, random_gradient


def first(k):
    """Return a sparsifier as a user writes one: the first k features."""

    def apply(u, state):
        kept = min(k, u.shape[1])
        return msbp.take_columns(u, jnp.arange(kept, dtype=jnp.int32)[None], rows_per_group=None), state

    return msbp.Sparsifier(init=lambda aval: (), apply=apply, name="first")


TABLE = {
    "dense": msbp.dense(),
    "top_k r=1": msbp.top_k(k=5),
    "top_k r=5": msbp.top_k(density=0.1, rows_per_group=5),
    "top_k whole": msbp.top_k(density=0.1, rows_per_group=None),
    "top_k all": msbp.top_k(k=1000),
    "random_k": msbp.random_k(k=5, rows_per_group=4),
    "random_k rescaled": msbp.random_k(density=0.2, rescale=True, key=jax.random.key(3)),
    "memorized top_k": msbp.memorized(msbp.top_k(k=5, rows_per_group=5), decay=0.8),
    "memorized slot": msbp.memorized(msbp.top_k(k=5, rows_per_group=5), decay=0.8, reduce="slot"),
    "memorized local": msbp.memorized(msbp.top_k(k=5, rows_per_group=None), decay=0.8, reduce="local", shards=1),
    "top_k example": msbp.top_k(k=5, rows_per_group="example"),
    "random_k example": msbp.random_k(k=5, rows_per_group="example"),
    "memorized random_k": msbp.memorized(msbp.random_k(k=5, rescale=True), decay=1.0),
    "memorized slot random_k": msbp.memorized(msbp.random_k(k=5, rescale=True), decay=0.5, reduce="slot"),
    "sample_rows": msbp.sample_rows(efficiency=0.8),
    "sample_rows density": msbp.sample_rows(density=0.25),
    "sample_rows r=5": msbp.sample_rows(efficiency=0.8, rows_per_group=5),
    "sample_rows example": msbp.sample_rows(density=0.5, rows_per_group="example"),
    "dithered": msbp.dithered(2),
    "dithered 8 bits": msbp.dithered(2, bits=8),
    "dithered 4 bits": msbp.dithered(0.5, bits=4),
    "sample_entries": msbp.sample_entries(0.25),
    "stochastic_prune": msbp.stochastic_prune(0.9),
    "skip_zero_rows": msbp.skip_zero_rows(),
    "split": msbp.split(dx=msbp.dense(), dw=msbp.top_k(k=5)),
    "split sample_rows": msbp.split(
        dx=msbp.sample_rows(density=0.5), dw=msbp.memorized(msbp.top_k(k=5, rows_per_group=5), decay=0.8)
    ),
    "a user's": first(4),
    "memorized a user's": msbp.memorized(first(4), decay=0.8),
}
UNBIASED = [
    "random_k rescaled",
    "sample_rows",
    "sample_rows density",
    "sample_rows r=5",
    "dithered",
    "dithered 8 bits",
    "sample_entries",
    "stochastic_prune",
]
every = pytest.mark.parametrize("name", TABLE)


def test_every_factory_is_in_the_table():
    factories = {
        name
        for name, value in vars(msbp).items()
        if inspect.isfunction(value) and inspect.signature(value).return_annotation == "Sparsifier"
    }
    plain = {"dense", "top_k", "random_k", "memorized", "sample_rows", "skip_zero_rows", "split"}
    assert factories == plain | {"dithered", "sample_entries", "stochastic_prune"}
    assert all(any(factory in name for name in TABLE) for factory in factories)


@every
def test_contract(name):
    check_sparsifier(TABLE[name], unbiased=name in UNBIASED)


@every
def test_abstract_init_and_apply(name):
    aval = jax.ShapeDtypeStruct((12, 96), jnp.bfloat16)
    state = jax.eval_shape(lambda: TABLE[name].init(aval))
    p, after = jax.eval_shape(TABLE[name].apply, aval, state)
    assert all(jax.eval_shape(lambda part: part.materialize(), part).dtype == jnp.bfloat16 for part in p.parts)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


@pytest.mark.slow
@every
def test_in_a_layer_under_remat_equals_without(name):
    layer = lambda w, x: jnp.tanh(x @ w)
    w, x = random_gradient(0, 6, 96), random_gradient(1, 12, 6)
    results = []
    for f in (layer, jax.checkpoint(layer)):
        g = msbp.sparse_vjp(f, TABLE[name])
        loss = lambda w, m, g=g: (g(w, x, memory=m) ** 2).sum()
        grads, after = jax.jit(msbp.value_and_grad(loss))(w, g.init_memory(w, x))[1:]
        results.append([grads, *[leaf for leaf in jax.tree.leaves(after) if leaf.dtype == jnp.float32]])
    assert_trees_close(*results)


@pytest.mark.slow
@every
def test_rows_over_eight_devices(name):
    u = random_gradient(4, 16, 96)
    state = TABLE[name].init(jax.ShapeDtypeStruct(u.shape, u.dtype))
    run = jax.jit(lambda u, s: [part.materialize() for part in TABLE[name].apply(u, s)[0].parts])
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(u, NamedSharding(mesh, PartitionSpec("rows")))
    assert_trees_close(run(spread, state), run(u, state), rtol=1e-5)


@every
def test_no_second_compilation(name):
    u = random_gradient(5, 12, 96)
    state = TABLE[name].init(jax.ShapeDtypeStruct(u.shape, u.dtype))
    apply = jax.jit(TABLE[name].apply)
    for _ in range(3):
        _, state = apply(u, state)
    assert apply._cache_size() == 1


@pytest.mark.parametrize(
    "inner", [msbp.top_k(k=5, rows_per_group=2), msbp.top_k(k=5, rows_per_group=None), msbp.random_k(k=5), msbp.dense()]
)
def test_local_treats_each_block_of_rows_for_itself(inner):
    local = msbp.memorized(inner, decay=0.8, reduce="local", shards=3)
    one = msbp.memorized(inner, decay=0.8)
    g = random_gradient(1, 12, 96)
    state = local.init(jax.ShapeDtypeStruct(g.shape, g.dtype))
    for _ in range(2):
        each = [one.apply(g[4 * i : 4 * i + 4], jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(3)]
        p, state = jax.jit(local.apply)(g, state)
        np.testing.assert_array_equal(p.materialize(), jnp.concatenate([part.materialize() for part, _ in each]))
        np.testing.assert_allclose(state.residual, jnp.stack([new.residual for _, new in each]), rtol=1e-5, atol=1e-6)
    keys = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.float32]
    assert len(keys) == ("random_k" in inner.name)
    assert all(len(np.unique(jax.random.key_data(key), axis=0)) == 3 for key in keys)  # blocks draw differently


@pytest.mark.parametrize("make", [msbp.top_k, msbp.random_k])
def test_a_choice_for_all_rows_of_an_example(make):
    """Rows of an example are those of one entry of the output's leading axis: here 4 time steps."""
    w, x = random_gradient(0, 6, 96), random_gradient(1, 12, 6).reshape(3, 4, 6)
    for wrap in (
        lambda s: s,
        lambda s: msbp.memorized(s, decay=0.8),
        lambda s: msbp.memorized(s, decay=0.8, reduce="local", shards=3),
    ):
        results = []
        for group in ("example", 4):
            f = msbp.sparse_vjp(lambda w, x: x @ w, wrap(make(k=5, rows_per_group=group)))
            loss = lambda w, m, f=f: (jnp.sin(f(w, x, memory=m))).sum()
            results.append(msbp.value_and_grad(loss)(w, f.init_memory(w, x))[1])
            assert f.report(w, x).sparse[0].rows_per_group == 4
        np.testing.assert_array_equal(*results)
    assert repr(make(k=5, rows_per_group="example")).startswith(f'{make.__name__}(k=5, rows_per_group="example"')
    with pytest.raises(
        TypeError, match=r'rows_per_group must be an integer \(.*"example" for all rows .*got \'image\''
    ):
        make(k=5, rows_per_group="image")


@pytest.mark.parametrize("group", [1, 3, None])
def test_ties_go_to_the_lower_index(group):
    u = jnp.tile(jnp.array([1.0, -2.0, 2.0, 1.0, -2.0, 0.0]), (5, 1))
    p, _ = msbp.top_k(k=2, rows_per_group=group).apply(u, ())
    np.testing.assert_array_equal(np.sort(p.index, axis=1), np.tile([1, 2], (len(p.index), 1)))
    p, _ = msbp.top_k(k=3, rows_per_group=group).apply(jnp.zeros((5, 6)), ())
    np.testing.assert_array_equal(np.sort(p.index, axis=1), np.tile([0, 1, 2], (len(p.index), 1)))


@pytest.mark.parametrize(
    ("density", "n", "k"), [(0.04, 500, 20), (0.001, 64, 1), (0.5, 5, 2), (0.7, 5, 4), (1.0, 9, 9)]
)
def test_k_from_density(density, n, k):
    p, _ = msbp.top_k(density=density).apply(jnp.ones((2, n)), ())
    assert p.kept_per_group == k == max(1, round(density * n))


def test_cosine_of_top_k():
    """cos(S_k(v), v) = norm kept / norm all >= sqrt(k/n), and random-k has E[cos^2] = k/n."""
    v = np.asarray(random_gradient(6, 1, 400), np.float64)
    p = np.asarray(msbp.top_k(k=16).apply(jnp.asarray(v, jnp.float32), ())[0].materialize(), np.float64)
    cosine = (p * v).sum() / np.linalg.norm(p) / np.linalg.norm(v)
    assert cosine == pytest.approx(np.linalg.norm(p) / np.linalg.norm(v), rel=1e-6)
    assert cosine >= (16 / 400) ** 0.5


def test_cosine_of_the_weight_gradient():
    """One example: cos(dW) = cos(g). Whole batch: cos = norm of the kept columns of dW / norm of all."""
    w, target = random_gradient(7, 10, 80), random_gradient(8, 6, 80)

    def weight_gradients(sparsifier, x):
        f = msbp.sparse_vjp(lambda w, x: x @ w, sparsifier)
        loss = lambda w, m: (f(w, x, memory=m) * target[: len(x)]).sum()
        sparse = msbp.value_and_grad(loss)(w, f.init_memory(w, x))[1]
        return np.asarray(sparse, np.float64), np.asarray(x.T @ target[: len(x)], np.float64)

    cosine = lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    x = random_gradient(9, 6, 10)
    sparse, true = weight_gradients(msbp.top_k(k=8), x[:1])
    g = np.asarray(target[:1], np.float64)
    kept = np.where(np.abs(g) >= np.sort(np.abs(g))[0, -8], g, 0)
    assert cosine(sparse, true) == pytest.approx(cosine(kept, g), rel=1e-6)
    sparse, true = weight_gradients(msbp.top_k(k=8, rows_per_group=None), x)
    columns = sparse.any(axis=0)
    assert columns.sum() == 8
    assert cosine(sparse, true) == pytest.approx(np.linalg.norm(true[:, columns]) / np.linalg.norm(true), rel=1e-6)


@pytest.mark.slow
def test_random_k_is_unbiased_with_the_variance_it_states():
    check_sparsifier(msbp.random_k(k=12, rescale=True, rows_per_group=4), unbiased=True)
    with pytest.raises(AssertionError, match="the mean of 4000 draws is off by"):
        check_sparsifier(msbp.random_k(k=12), unbiased=True)
    u, s = random_gradient(10, 1, 40), msbp.random_k(k=8, rescale=True)

    def draw(state, _):
        p, state = s.apply(u, state)
        return state, p.materialize()

    draws = np.asarray(jax.lax.scan(draw, s.init(u), None, length=4000)[1], np.float64)
    ratio = draws.var(0) / ((40 / 8 - 1) * np.asarray(u, np.float64) ** 2)
    assert 0.85 < ratio.min() < ratio.max() < 1.15  # 4000 draws at share 0.2: standard error 2 %
    hits = (draws != 0).sum(0).ravel()
    expected = 4000 * 8 / 40
    chi_square = ((hits - expected) ** 2 / (expected * (1 - 8 / 40))).sum() * (39 / 40)
    assert 16 < chi_square < 73  # 39 degrees of freedom: both tails beyond 1e-3


@pytest.mark.parametrize("factory", [msbp.top_k, msbp.random_k])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"takes either density= or k=, got neither\. Write \w+\(density=0\.04\)"),
        ({"density": 0.1, "k": 3}, ValueError, r"takes either density= or k=, got density=0\.1 and k=3"),
        ({"k": 0}, ValueError, r"k must be at least 1 \(features kept in each group of rows\), got 0"),
        ({"k": 2.5}, TypeError, r"k must be an integer \(.*\), got 2\.5"),
        ({"k": True}, TypeError, r"k must be an integer"),
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\] \(share of the features kept\), got 0\.0"),
        ({"density": 1.5}, ValueError, r"density must lie in \(0, 1\].*got 1\.5"),
        ({"density": float("nan")}, ValueError, r"density must lie in \(0, 1\].*got nan"),
        ({"density": "a"}, TypeError, r"density must be a number in \(0, 1\].*got 'a'"),
        ({"k": 3, "rows_per_group": 0}, ValueError, r"rows_per_group must be at least 1 .*None for one choice.*got 0"),
        ({"k": 3, "rows_per_group": 1.5}, TypeError, r"rows_per_group must be an integer"),
    ],
)
def test_bad_arguments(factory, arguments, error, message):
    with pytest.raises(error, match=message):
        factory(**arguments)


@pytest.mark.parametrize("key", [3, jnp.zeros(2, jnp.uint32), jax.random.split(jax.random.key(0), 2)])
def test_a_bad_key(key):
    with pytest.raises(TypeError, match=r"key must be one typed PRNG key such as jax\.random\.key\(0\), got"):
        msbp.random_k(k=3, key=key)


@pytest.mark.parametrize(
    "inner", [msbp.sample_rows(density=0.5), msbp.split(dx=msbp.dense(), dw=msbp.sample_rows(density=0.5))], ids=str
)
def test_nothing_is_left_of_sampled_rows_to_remember(inner):
    with pytest.raises(ValueError, match=r"got .*sample_rows\(density=0\.5\).*nothing is left to remember.*@outputs"):
        msbp.memorized(inner, decay=0.5)


@pytest.mark.parametrize("part", ["dx", "dw"])
def test_split_takes_sparsifiers(part):
    with pytest.raises(TypeError, match=rf"split takes sparsifiers, such as {part}=msbp\.dense\(\), got {part}=0\.5"):
        msbp.split(**({"dx": msbp.dense(), "dw": msbp.dense()} | {part: 0.5}))
