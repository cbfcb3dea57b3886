"""Rows over eight devices: the numbers of one under jit; inside a shard_map each device draws for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from twins import assert_trees_close

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

ROWS, M, N = 64, 8, 64
HALF, SKIP = msbp.sample_rows(density=0.5), msbp.skip_zero_rows()
TOP = msbp.memorized(msbp.top_k(k=6, rows_per_group=2), decay=0.8)
PARAMS = {"a": random_gradient(0, M, N) / 4, "b": random_gradient(1, N, N) / 8}
X, TARGET = random_gradient(2, ROWS, M), random_gradient(3, ROWS, N)
PLANS = {
    "drawn once": HALF,
    "by efficiency": msbp.sample_rows(efficiency=0.8),
    "groups": msbp.sample_rows(density=0.5, rows_per_group=4),
    "groups across devices": msbp.sample_rows(density=0.5, rows_per_group=12),
    "at each site": {"*": HALF},
    "rows and columns": {"@outputs": HALF, "*": TOP},
    "dw alone": {"*": msbp.split(dx=msbp.dense(), dw=msbp.sample_rows(density=0.5, scores="product"))},
}


def network(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def loss_of(f):
    return lambda p, m, x, t: ((f(p, x, memory=m) - t) ** 2).sum()


def spread(tree, kind=AxisType.Auto):
    return jax.device_put(tree, NamedSharding(mesh_of(kind), P("data")))


def numbers(result):
    """Return loss, gradients and the memory, keys as bits."""
    bits = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return jax.tree.map(bits, result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),  # both backends for one draw, one of them for each other plan, by turns
    [("drawn once", "xla"), *((name, (None, "xla")[i % 2]) for i, name in enumerate(PLANS))],
)
def test_under_jit_eight_devices_are_one(name, backend):
    plan = PLANS[name]
    f = msbp.sparse_vjp(network, plan, backend=backend)
    step, memory = jax.jit(msbp.value_and_grad(loss_of(f))), f.init_memory(PARAMS, X)
    for _ in range(2):
        want = step(PARAMS, memory, X, TARGET)
        assert_trees_close(numbers(step(PARAMS, memory, *spread((X, TARGET)))), numbers(want), rtol=1e-4)
        memory = want[2]


@pytest.mark.parametrize("plan", [HALF, {"*": HALF}], ids=["drawn once", "at each site"])
def test_a_mesh_of_explicit_axes(plan):
    f = msbp.sparse_vjp(network, plan)
    memory = f.init_memory(PARAMS, X)
    step = jax.jit(msbp.value_and_grad(loss_of(f)))
    want = step(PARAMS, memory, X, TARGET)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        got = step(PARAMS, memory, *spread((X, TARGET), AxisType.Explicit))
    assert_trees_close(numbers(got), numbers(want), rtol=1e-4)


@pytest.mark.parametrize("live", ["none", "those of two devices", "every third"])
def test_rows_of_zeros_over_devices(live):
    rows = np.arange(ROWS)
    mask = {"none": rows < 0, "those of two devices": rows < 16, "every third": rows % 3 == 0}[live]
    mask = jnp.asarray(mask, jnp.float32)[:, None]
    grad = lambda f: jax.jit(jax.grad(lambda p, x, mask: (jnp.sin(f(p, x)) * mask).sum(), argnums=(0, 1)))
    got = grad(msbp.sparse_vjp(network, SKIP))(PARAMS, *spread((X, mask)))
    assert_trees_close(got, grad(network)(PARAMS, X, mask))


@pytest.mark.parametrize("check", [True, False])
def test_a_shard_map_inside_of_what_is_wrapped(check):
    """The draw is outside of it, over all rows; what is skipped is each device's own."""
    inside = jax.shard_map(network, mesh=mesh_of(), in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check)
    steps = []
    for function in (inside, network):
        f = msbp.sparse_vjp(function, HALF)
        memory = msbp.sparse_vjp(network, HALF).init_memory(PARAMS, X)
        steps.append(jax.jit(msbp.value_and_grad(loss_of(f)))(PARAMS, memory, X, TARGET))
    assert_trees_close(numbers(steps[0]), numbers(steps[1]), rtol=1e-4)


def with_probe(p, x):
    return network(p, x) + p["probe"]


SPECS = {"a": P(), "b": P(), "probe": P("data")}
PROBED = PARAMS | {"probe": jnp.zeros((ROWS, N))}


def rows_of_devices(probe):
    """Return which rows each device kept."""
    return np.asarray(probe).any(axis=1).reshape(8, 8)


@pytest.mark.parametrize("check", [True, False])
def test_inside_a_shard_map_each_device_draws_for_itself(check):
    """With keys of their own where JAX checks types, as nothing else says that the devices have other rows."""
    f = msbp.sparse_vjp(with_probe, HALF)
    memory = f.init_memory(PARAMS | {"probe": jnp.zeros((8, N))}, X[:8])

    def local(p, m, x, t):
        y, pull_back = jax.vjp(lambda p: f(p, x, memory=m), p)
        return pull_back(2 * (y - t))[0]

    out = SPECS if check else dict.fromkeys(SPECS, P("data"))
    places = {"in_specs": (SPECS, P(), P("data"), P("data")), "out_specs": out}
    grads = jax.jit(jax.shard_map(local, mesh=mesh_of(), check_vma=check, **places))(PROBED, memory, X, TARGET)
    kept = rows_of_devices(grads["probe"])
    assert np.isfinite(np.asarray(grads["a"])).all()
    assert (kept.sum(axis=1) == 4).all()
    assert not check or len({tuple(rows) for rows in kept}) > 4


def test_inside_a_shard_map_sites_draw_for_each_device():
    """All rows are alike, so that nothing but the key can tell devices apart; rows of the identity show what was."""
    f = msbp.sparse_vjp(lambda w, x: x @ w, {"*": HALF})
    w, x = jnp.zeros((ROWS, N)), jnp.eye(ROWS)
    memory = f.init_memory(w, x[:8])
    mapped = jax.shard_map(
        lambda w, m, x: lax.psum(f(w, x, memory=m).sum(), "data"),
        mesh=mesh_of(), in_specs=(P(), P(), P("data")), out_specs=P(),
    )  # fmt: skip
    kept = rows_of_devices(jax.jit(msbp.value_and_grad(mapped))(w, memory, x)[1])
    assert (kept.sum(axis=1) == 4).all()
    assert len({tuple(rows) for rows in kept}) > 4


def test_the_sum_over_devices_is_the_gradient_of_the_rows_that_they_kept():
    f = msbp.sparse_vjp(with_probe, HALF)
    memory = f.init_memory(PARAMS | {"probe": jnp.zeros((8, N))}, X[:8])
    mapped = jax.shard_map(
        lambda p, m, x, t: lax.psum(loss_of(f)(p, m, x, t), "data"),
        mesh=mesh_of(), in_specs=(SPECS, P(), P("data"), P("data")), out_specs=P(),
    )  # fmt: skip
    _, grads, after = jax.jit(msbp.value_and_grad(mapped))(PROBED, memory, X, TARGET)
    _, pull_back = jax.vjp(lambda p: network(p, X), PARAMS)
    assert_trees_close({name: grads[name] for name in PARAMS}, pull_back(grads["probe"])[0])
    assert (rows_of_devices(grads["probe"]).sum(axis=1) == 4).all()
    assert float(after["@outputs"].kept) == 4  # the mean over devices
