"""Dithered, sampled and pruned entries in whole models: what they change, what they do not, and what is said."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

ROWS, M, N = 64, 24, 48
PARAMS = {"a": random_gradient(0, M, N) / 8, "b": random_gradient(1, 1, N)[0] / 8, "c": random_gradient(2, N, 10) / 8}
X, TARGET = random_gradient(3, ROWS, M), random_gradient(4, ROWS, 10)
EVERY = {
    "dithered": msbp.dithered(3),
    "dithered 8 bits": msbp.dithered(1, bits=8),
    "sample_entries": msbp.sample_entries(0.1),
    "stochastic_prune": msbp.stochastic_prune(0.9),
}
every = pytest.mark.parametrize("sparsifier", EVERY.values(), ids=EVERY)
NATIVE = "native" in msbp.backends()["grad_input"]


def network(p, x):
    return jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]


def loss_of(f):
    return lambda p, m, x, t: ((f(p, x, memory=m) - t) ** 2).mean()


def numbers(tree):
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


@every
def test_both_products_are_those_of_one_draw_and_the_bias_sees_all(sparsifier):
    """The rows of the identity show p itself in dw."""
    f = msbp.sparse_vjp(lambda p, x: x @ p["w"] + p["b"][None], sparsifier)
    p, x = {"w": random_gradient(6, ROWS, N), "b": PARAMS["b"]}, jnp.eye(ROWS)
    memory, g = f.init_memory(p, x), random_gradient(5, ROWS, N)
    loss = lambda p, x, m: (f(p, x, memory=m) * g).sum()
    _, (grads, dx), _ = msbp.value_and_grad(lambda px, m: loss(*px, m))((p, x), memory)
    made = np.asarray(grads["w"])
    assert_trees_equal(grads["b"], g.sum(0))
    assert 0 < (made != 0).mean() < 0.75
    step = np.abs(made[made != 0]).min()
    whole = np.abs(made / step - np.round(made / step)) < 1e-2
    assert (whole | np.isclose(made, g, rtol=1e-5)).all()
    error = np.abs(dx - made @ np.asarray(p["w"]).T).max() / np.abs(dx).max()
    assert error < (0.02 if "bits" in sparsifier.name else 1e-5)


@pytest.mark.slow
@every
def test_the_mean_over_keys_is_the_gradient(sparsifier):
    f = msbp.sparse_vjp(network, sparsifier)
    memory = f.init_memory(PARAMS, X)
    with_key = lambda key: jax.tree.map(
        lambda leaf: key if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, memory
    )
    # The gradient of the first layer goes through dx of the second; both draw.
    step = lambda key: msbp.value_and_grad(loss_of(f))(PARAMS, with_key(key), X, TARGET)[1]
    draws = jax.jit(jax.vmap(step))(jax.random.split(jax.random.key(0), 1500))
    plain = jax.grad(lambda p: ((network(p, X) - TARGET) ** 2).mean())(PARAMS)
    for name in PARAMS:
        got, want = np.asarray(draws[name], np.float64), np.asarray(plain[name], np.float64)
        seldom = 7 * np.abs(got).max() / len(got)
        rounding = 0.01 * np.abs(want).max() if "bits" in sparsifier.name else 0
        allowed = 5 * got.std(0) / len(got) ** 0.5 + seldom + rounding + 1e-6
        assert (np.abs(got.mean(0) - want) <= allowed).all(), name


@pytest.mark.parametrize("name", ["dithered", "sample_entries", "stochastic_prune"])
def test_backends_are_one(name):
    steps = []
    for backend in ("xla", "native", None) if NATIVE else ("xla", None):
        f = msbp.sparse_vjp(network, EVERY[name], backend=backend)
        steps.append(jax.jit(msbp.value_and_grad(loss_of(f)))(PARAMS, f.init_memory(PARAMS, X), X, TARGET))
    for other in steps[1:]:
        assert_trees_close(numbers(other), numbers(steps[0]), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, None) for name in EVERY), ("dithered", "xla"), ("dithered 8 bits", "xla")]
)
def test_eight_devices_are_one(name, backend):
    f = msbp.sparse_vjp(network, EVERY[name], backend=backend)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step, memory = jax.jit(msbp.value_and_grad(loss_of(f))), f.init_memory(PARAMS, X)
    spread = jax.device_put((X, TARGET), NamedSharding(mesh, P("data")))
    for _ in range(2):
        want = step(PARAMS, memory, X, TARGET)
        assert_trees_close(numbers(step(PARAMS, memory, *spread)), numbers(want), rtol=2e-3)
        memory = want[2]


def test_inside_a_shard_map_each_device_draws_for_itself():
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.sample_entries(0.3))
    w, x = jnp.zeros((ROWS, N)), jnp.eye(ROWS)  # dw is p itself
    memory = f.init_memory(w, x[:8])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda w, m, x: lax.psum(f(w, x, memory=m).sum(), "data"),
        mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(),
    )  # fmt: skip
    kept = np.asarray(jax.jit(msbp.value_and_grad(mapped))(w, memory, x)[1]).reshape(8, 8, N) != 0
    assert len({block.tobytes() for block in kept}) == 8


@every
def test_scan_remat_and_vmap_draw_anew(sparsifier):
    stack = jnp.stack([random_gradient(i, N, N) / 8 for i in range(3)])
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    f = msbp.sparse_vjp(lambda ws, x: lax.scan(jax.checkpoint(layer), x, ws)[0], sparsifier)
    x = random_gradient(0, ROWS, N)
    memory = f.init_memory(stack, x)
    _, grads, after = jax.jit(msbp.value_and_grad(lambda w, m: (f(w, x, memory=m) ** 2).sum()))(stack, memory)
    assert all(np.abs(grads[i]).max() > 0 for i in range(3))
    assert all(np.isfinite(np.asarray(value)) for value in msbp.metrics(after).values())
    assert len({key.tobytes() for key in np.asarray(jax.random.key_data(after["params"].key))}) == 3


def test_rows_first_and_entries_within_them():
    plan = {"@outputs": msbp.sample_rows(density=0.25), "*": msbp.dithered(2)}
    probed = lambda p, x: network(p, x) + p["probe"]
    f = msbp.sparse_vjp(probed, plan)
    p = PARAMS | {"probe": jnp.zeros((ROWS, 10))}
    _, grads, after = msbp.value_and_grad(loss_of(f))(p, f.init_memory(p, X), X, TARGET)
    assert np.asarray(grads["probe"]).any(1).sum() == ROWS // 4
    told = msbp.metrics(after)
    assert float(told["@outputs/density"]) == 0.25
    assert 0 < float(told["a/density"]) < 0.25


def test_dw_alone():
    f = msbp.sparse_vjp(network, msbp.split(dx=msbp.dense(), dw=msbp.dithered(4)))
    memory = f.init_memory(PARAMS, X)
    loss = lambda x: loss_of(f)(PARAMS, memory, x, TARGET)
    assert_trees_equal(jax.grad(loss)(X), jax.grad(lambda x: ((network(PARAMS, x) - TARGET) ** 2).mean())(X))
    _, grads, _ = msbp.value_and_grad(loss_of(f))(PARAMS, memory, X, TARGET)
    plain = jax.grad(lambda p: ((network(p, X) - TARGET) ** 2).mean())(PARAMS)
    assert np.abs(grads["a"] - plain["a"]).max() > 0
    assert_trees_close(grads["b"], plain["b"])


@pytest.mark.parametrize("bits", [None, 8])
def test_training_a_flax_model(bits):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))

    model = msbp.sparse_vjp(Net(), msbp.dithered(2, bits=bits))
    variables = model.init(jax.random.key(0), X)
    state = msbp.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.02),
        memory=model.init_memory(variables, X),
    )  # fmt: skip
    loss_fn = lambda p, m, batch: ((model.apply({"params": p}, batch[0], memory=m) - batch[1]) ** 2).mean()
    losses, step = [], jax.jit(msbp.value_and_grad(loss_fn))
    for _ in range(60):
        value, grads, memory = step(state.params, state.memory, (X, TARGET))
        state = state.apply_gradients(grads=grads, memory=memory)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    told = msbp.metrics(state.memory)
    assert 0 < float(told["Dense_0/kernel/density"]) < 0.6
    assert ("Dense_0/kernel/clipped" in told) == (bits is not None)


def test_an_nnx_model():
    model = msbp.sparse_vjp(nnx.Linear(M, N, rngs=nnx.Rngs(0)), msbp.dithered(2))
    model.init_memory(X)
    _, grads = msbp.nnx.value_and_grad(lambda model: (model(X) ** 2).sum())(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers(grads)) if leaf.dtype == jnp.float32)


@pytest.mark.skipif(not NATIVE, reason="the native kernels were not built")
def test_the_report():
    report = msbp.sparse_vjp(network, msbp.dithered(4)).report(PARAMS, X)
    assert [row.name for row in report.sparse] == ["a", "c"]  # however narrow
    row = report.sparse[0]
    assert (row.keeps, row.skips, row.backend) == (
        "entries that are not 0",
        "entries",
        "native, below 33% of the entries",
    )
    assert "at run" in str(report)  # where the report of columns has what is saved
    assert "the share of the entries that are left out" in " ".join(str(report).split())
    row = msbp.sparse_vjp(network, msbp.sample_entries(0.1)).report(PARAMS, X).sparse[0]
    assert (row.keeps, row.skips, row.warning) == ("0.1 of the entries", "", "")
    assert row.saved == pytest.approx(0.9)


def test_the_report_says_where_nothing_is_saved():
    row = msbp.sparse_vjp(network, msbp.dithered(4), backend="xla").report(PARAMS, X).sparse[0]
    assert (row.skips, row.saved) == ("", 0)
    assert "only native kernels leave out single entries" in row.warning
    row = msbp.sparse_vjp(network, msbp.dithered(4, bits=8)).report(PARAMS, X).sparse[0]
    assert (row.keeps, row.backend, row.saved) == ("entries that are not 0, 8 bits", "xla, 8 bits", 0)
    assert "a CPU emulates 8-bit products, with equal results and no faster than dense" in row.warning
    card = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
        row = msbp.sparse_vjp(network, msbp.dithered(4, bits=8)).report(PARAMS, X).sparse[0]
    assert "probably no faster than the dense one, as measured on an H200" in row.warning


def report_of(sparsifier, dtype=jnp.float32, **options):
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    return msbp.sparse_vjp(network, sparsifier, **options).report(cast(PARAMS), X.astype(dtype)).sparse[0]


def test_the_report_of_what_runs_dense_all_the_same():
    row = report_of(msbp.sample_entries(0.5))
    assert (row.saved, row.backend) == (0, "xla, dense")
    assert not NATIVE or "so many entries are kept that it is faster" in row.warning
    row = report_of(msbp.dithered(4), jnp.float16)
    assert (row.saved, row.skips, row.backend) == (0, "", "xla, dense")
    assert "in float32 and bfloat16" in row.warning
    row = report_of(msbp.split(dx=msbp.dense(), dw=msbp.dithered(4, bits=8)))
    assert (row.backend, row.saved) == ("dx xla, dense; dw xla, 8 bits", 0)
    assert "a CPU emulates 8-bit products" in row.warning
    assert report_of(msbp.dithered(4, bits=8), backend="native" if NATIVE else "xla").backend == "xla, 8 bits"


@pytest.mark.skipif(not NATIVE, reason="the native kernels were not built")
def test_the_report_of_rows_for_one_product_and_entries_for_the_other():
    row = report_of(msbp.split(dx=msbp.skip_zero_rows(), dw=msbp.dithered(4)))
    assert row.skips == "rows and entries"


@pytest.mark.skipif(not NATIVE, reason="the native kernels were not built")
def test_inside_a_shard_map_each_device_has_its_own_share_of_entries():
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.dithered(3))
    w, x = random_gradient(0, 16, N), random_gradient(1, ROWS, 16)
    g = random_gradient(2, ROWS, N).at[:8].set(1.0)  # the first device's has no spread, and is passed on
    memory = f.init_memory(w, x[:8])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda w, m, x, g: lax.psum((f(w, x, memory=m) * g).sum(), "data"),
        mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P(),
    )  # fmt: skip
    step = jax.jit(msbp.value_and_grad(mapped))
    _, got, after = step(w, memory, x, g)
    assert np.isfinite(got).all()
    assert 0.125 < float(after["params"].density) < 0.6
    assert not np.allclose(got, x.T @ g)


@pytest.mark.slow
@every
def test_convolutions_run_whole_and_the_report_says_so(sparsifier):
    conv = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    f = msbp.sparse_vjp(conv, sparsifier)
    w, x = random_gradient(0, 27, 64).reshape(3, 3, 3, 64), random_gradient(1, 4 * 36, 3).reshape(4, 6, 6, 3)
    memory = f.init_memory(w, x)
    g = random_gradient(2, 4 * 36, 64).reshape(4, 6, 6, 64)
    loss = lambda w, m: (f(w, x, memory=m) * g).sum()

    def draw(memory, _):
        _, dw, memory = msbp.value_and_grad(loss)(w, memory)
        return memory, dw

    draws = np.asarray(lax.scan(draw, memory, None, length=144)[1], np.float64)
    want = np.asarray(jax.grad(lambda w: (conv(w, x) * g).sum())(w), np.float64)
    assert (np.abs(draws.mean(0) - want) < 5 * draws.std(0) / 12 + 1e-3 * np.abs(want).max()).all()
    assert draws.std(0).min() > 0
    said = "8 bits are for matrix products" if "bits" in sparsifier.name else "entries are left out of matrix products"
    assert said in f.report(w, x).sparse[0].warning


@every
def test_no_second_compilation(sparsifier):
    f = msbp.sparse_vjp(network, sparsifier)
    step, memory, p = jax.jit(msbp.value_and_grad(loss_of(f))), f.init_memory(PARAMS, X), PARAMS
    for _ in range(3):
        _, grads, memory = step(p, memory, X, TARGET)
        p = jax.tree.map(lambda p, g: p - 0.01 * g, p, grads)
    assert step._cache_size() == 1
