"""Sparsifiers within sparsifiers, and states within states: each composition is right, or refused with the reason."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from twins import assert_trees_equal

import msbp_jax as msbp
from msbp_jax.testing import check_sparsifier

W = jax.random.normal(jax.random.key(0), (8, 64)) / 3
X = jax.random.normal(jax.random.key(1), (16, 8))
TOP = msbp.top_k(k=6)


def product(w, x):
    return x @ w


def halved(inner, name="halved", **fields):
    """Return what a user writes around a sparsifier: half of what is handed to it goes to `inner`."""

    def apply(u, state):
        return inner.apply(u * 0.5, state)

    return msbp.Sparsifier(init=inner.init, apply=apply, name=name, **fields)


def running_norm():
    """Return a user's sparsifier with numbers of its own in its state, in the units of the gradient."""

    def init(aval):
        return {"norm": jnp.zeros((), jnp.float32), "seen": jnp.zeros((), jnp.int32)}

    def apply(u, state):
        norm = 0.5 * state["norm"] + jnp.linalg.norm(u).astype(jnp.float32)
        columns, _ = TOP.apply(u, ())
        return columns, {"norm": norm, "seen": state["seen"] + 1}

    return msbp.Sparsifier(init=init, apply=apply, name="running norm")


MEMORIZED = {
    "mean": msbp.memorized(TOP, 0.8),
    "slot": msbp.memorized(TOP, 0.8, reduce="slot"),
    "local": msbp.memorized(TOP, 0.8, reduce="local", shards=2),
    "random": msbp.memorized(msbp.random_k(k=6), 0.8),
}


@pytest.mark.parametrize("outer", ["mean", "slot", "local"])
@pytest.mark.parametrize("inner", MEMORIZED)
def test_a_memory_within_a_memory_is_refused(inner, outer):
    options = {"mean": {}, "slot": {"reduce": "slot"}, "local": {"reduce": "local", "shards": 1}}[outer]
    with pytest.raises(ValueError, match=r"memorized wraps a sparsifier without a memory, got memorized\(.*outermost"):
        msbp.memorized(MEMORIZED[inner], 0.5, **options)
    # Within something of a user's own it is seen when the state is made.
    hidden = msbp.memorized(halved(MEMORIZED[inner]), 0.5, **options)
    with pytest.raises(ValueError, match=r"memorized wraps a sparsifier without a memory, got halved"):
        msbp.sparse_vjp(product, hidden).init_memory(W, X)


def test_decay_0_is_the_sparsifier_itself_and_adds_no_memory():
    assert msbp.memorized(TOP, 0) is TOP
    assert msbp.memorized(msbp.memorized(TOP, 0), 0.5).name == msbp.memorized(TOP, 0.5).name
    with pytest.raises(ValueError, match="without a memory"):
        msbp.memorized(msbp.memorized(TOP, 0.5), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIZED)
def test_a_memory_inside_a_users_own_is_a_memory(name):
    """The other way round is right: what wraps a memorized sparsifier without a memory of its own."""
    sparsifier, own = MEMORIZED[name], halved(MEMORIZED[name])
    if name in ("mean", "slot"):  # a batch of one row has not the blocks of "local"
        check_sparsifier(own)
    f, g = (msbp.sparse_vjp(product, s) for s in (sparsifier, own))
    step = lambda f, scale: jax.jit(msbp.value_and_grad(lambda w, m, x: scale * (f(w, x, memory=m) * X.sum()).mean()))
    a, b = f.init_memory(W, X), g.init_memory(W, X)
    inside, outside = step(f, 0.5), step(g, 1.0)
    for _ in range(3):
        _, want, a = inside(W, a, X)
        _, got, b = outside(W, b, X)
        assert_trees_equal(got, want)


WHERE = msbp.Where(rows=8, n=64, m=8, dtype=jnp.float32, rows_per_example=4, min_features=1)


def test_what_the_inside_becomes_at_a_site_is_passed_on():
    def at(where):
        place = "device" if where.on_devices else f"{where.rows_per_example} rows"
        return msbp.Stays("too short") if where.rows == 1 else halved(TOP, f"by {place}", at=at)

    inner = halved(TOP, "whole", at=at)
    for sparsifier, reduce in (
        (msbp.memorized(inner, 0.5), ""),
        (msbp.memorized(inner, 0.5, reduce="slot"), ', reduce="slot"'),
        (msbp.memorized(inner, 0.5, reduce="local", shards=2), ', reduce="local"'),
    ):
        assert sparsifier.at(WHERE).name == f"memorized(by 4 rows, decay=0.5{reduce})"
        on_devices = sparsifier.at(WHERE._replace(on_devices=True))
        assert on_devices.name == f"memorized(by device, decay=0.5{reduce.replace(', reduce="local"', '')})"
        assert on_devices.per_device == ("local" in reduce)
        assert sparsifier.at(WHERE._replace(rows=1)) == msbp.Stays("too short")


def test_who_gates_by_width():
    narrow = WHERE._replace(n=10, min_features=64)
    too_narrow = msbp.Stays("10 features, fewer than min_features=64")
    for sparsifier in (TOP, *MEMORIZED.values(), msbp.random_k(k=2), msbp.memorized(halved(TOP), 0.5)):
        assert sparsifier.at(narrow) == too_narrow
    mindless = halved(TOP, at=lambda where: halved(TOP))  # of width it takes no notice
    assert msbp.memorized(mindless, 0.5).at(narrow).name == "memorized(halved, decay=0.5)"
    f = lambda plan: msbp.sparse_vjp(lambda p, x: x @ p["head"] + (x @ p["hidden"])[:, :10], plan)
    params = {"head": W[:, :10], "hidden": W}
    sites = lambda plan: set(f(plan).init_memory(params, X))
    assert sites(TOP) == sites({"*": TOP}) == {"hidden"}
    assert sites({"head": TOP, "*": TOP}) == sites({"h*": TOP}) == {"head", "hidden"}  # what is named is not overruled
    assert sites(halved(TOP)) == {"hidden"}
    assert sites(mindless) == {"head", "hidden"}


def test_a_backend_that_is_asked_for_reaches_the_selection():
    """Where there is one of that name: "dense" is a way to make products, and no selection."""
    asked = {name: TOP.at(WHERE._replace(backend=name)) for name in (None, "xla", "gpu", "dense")}
    assert asked[None] == asked["dense"] == TOP
    assert len({asked["xla"], asked["gpu"], TOP}) == 3
    u = jnp.ones((WHERE.rows, WHERE.n))
    text = jax.jit(lambda u: asked["xla"].apply(u, ())[0].materialize()).lower(u).as_text()
    assert "msbp_select" not in text


@pytest.mark.parametrize("reduce", ["mean", "slot", "local"])
def test_what_the_inside_becomes_on_a_device_runs_there(reduce):
    nothing = msbp.Sparsifier(init=lambda aval: (), apply=lambda u, s: (TOP.apply(u * 0, s)[0], s), name="nothing")
    inner = msbp.Sparsifier(init=TOP.init, apply=TOP.apply, name="top", at=lambda w: nothing if w.on_devices else TOP)
    options = {"reduce": reduce} | ({"shards": 8} if reduce == "local" else {})
    f = msbp.sparse_vjp(by_rows(product), msbp.memorized(inner, 0.5, **options))
    memory = f.init_memory(W, X)
    grads = jax.jit(msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).mean()))(W, memory, X)[1]
    assert not np.any(grads)
    assert "nothing" in str(f.report(W, X))


def by_rows(function):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0**10, 2.0**-10])
@pytest.mark.parametrize("name", ["mean", "slot", "local", "in a user's own", "two in a tuple", "with numbers"])
def test_a_dynamic_scale_scales_every_residual(name, factor):
    """Residuals are in the units of the gradient, however deep they stand: a change of the scale changes nothing."""
    pair = msbp.Sparsifier(
        init=lambda aval: (MEMORIZED["mean"].init(aval), MEMORIZED["slot"].init(aval)),
        apply=lambda u, s: _both(u, s),
        name="two",
    )

    def _both(u, states):
        p, one = MEMORIZED["mean"].apply(u, states[0])
        _, two = MEMORIZED["slot"].apply(u, states[1])
        return p, (one, two)

    sparsifier = MEMORIZED | {
        "in a user's own": halved(MEMORIZED["mean"]),
        "two in a tuple": pair,
        "with numbers": msbp.memorized(running_norm(), 0.8),
    }
    f = msbp.sparse_vjp(product, sparsifier[name])
    loss = lambda w, m, x: (f(w, x, memory=m) ** 2).mean()
    plain = scaled = f.init_memory(W, X)
    scales = [1.0, factor, 1.0]
    for number, scale in enumerate(scales):
        _, want, plain = msbp.value_and_grad(loss)(W, plain, X)
        if name == "with numbers" and number:  # what a user's state means is the user's: it is as it was left
            break
        step = msbp.DynamicScale(scale=scale).value_and_grad(loss)(W, scaled, X)
        scaled = step.memory
        assert step.finite
        assert_trees_equal(step.grads, want)
        assert_trees_equal(*(jax.tree.map(np.asarray, tree) for tree in (scaled, plain)))


def twin_models():
    f, g = (msbp.sparse_vjp(product, s) for s in (msbp.top_k(k=6), msbp.top_k(k=32)))
    loss = lambda p, m, x: (f(p["f"], x, memory=m["f"]) * g(p["g"], x, memory=m["g"])).mean()
    params = {"f": W, "g": W + 1}
    return loss, params, {"f": f.init_memory(params["f"], X), "g": g.init_memory(params["g"], X)}


def test_diagnose_keeps_sites_of_one_name_apart():
    sites = msbp.diagnose(twin_models()[0])(*twin_models()[1:], X).sites
    assert set(sites) == {"params", "params#2"}
    np.testing.assert_allclose([sites["params"].density, sites["params#2"].density], [6 / 64, 0.5], rtol=1e-6)


def test_diagnose_numbers_past_names_that_are_taken():
    one = msbp.sparse_vjp(lambda w, x: (x @ w) * jnp.tanh(x @ w), TOP)  # has params and params#2 itself
    other = msbp.sparse_vjp(product, msbp.top_k(k=32))
    loss = lambda p, m, x: (one(p, x, memory=m[0]) * other(p, x, memory=m[1])).mean()
    memory = (one.init_memory(W, X), other.init_memory(W, X))
    sites = msbp.diagnose(loss)(W, memory, X).sites
    assert len(sites) == 3
    densities = sorted(round(float(site.density), 3) for site in sites.values())
    assert densities == [0.094, 0.094, 0.5]


def test_diagnose_of_one_model_called_three_times():
    f = msbp.sparse_vjp(product, MEMORIZED["mean"])
    loss = lambda w, m, x: sum((f(w, x * i, memory=m) ** 2).mean() for i in (1, 2, 3))
    sites = msbp.diagnose(loss)(W, f.init_memory(W, X), X).sites
    assert set(sites) == {"params", "params#2", "params#3"}


def test_sparsifiers_are_values():
    """Made alike they are alike where it matters: as settings of a compiled step, and after a journey as bytes."""
    for sparsifier in (*MEMORIZED.values(), TOP, msbp.random_k(k=3, key=jax.random.key(4)), msbp.dense()):
        copy = pickle.loads(pickle.dumps(sparsifier))
        assert copy == sparsifier
        assert (copy != sparsifier) is False
        assert hash(copy) == hash(sparsifier)
        assert copy.name == sparsifier.name
    assert msbp.memorized(msbp.top_k(k=6), 0.8) == MEMORIZED["mean"]
    different = [*MEMORIZED.values(), TOP, msbp.top_k(k=7), msbp.top_k(k=6, rows_per_group=2), msbp.memorized(TOP, 0.7)]
    different += [msbp.random_k(k=3, key=jax.random.key(seed)) for seed in (0, 1)]
    assert len(set(different)) == len(different)
    assert TOP != 3
