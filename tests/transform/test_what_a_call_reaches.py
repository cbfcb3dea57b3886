"""A memory is of a model, not of one call: a call may reach fewer sites, have no rows, or run outside of jit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

N = 64
INNER = msbp.top_k(k=7, rows_per_group=2)
SPARSIFIERS = {
    "top_k": INNER,
    "mean": msbp.memorized(INNER, 0.5),
    "slot": msbp.memorized(INNER, 0.5, reduce="slot"),
    "random": msbp.memorized(msbp.random_k(k=7), 0.5),
    "dense": msbp.memorized(msbp.dense(), 0.5),
    "example": msbp.memorized(msbp.top_k(k=7, rows_per_group="example"), 0.5),
    "all": msbp.memorized(msbp.top_k(k=7, rows_per_group=None), 0.5),
}
X = jax.random.normal(jax.random.key(1), (8, 6))


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "in": jax.random.normal(keys[0], (6, N)) / 3,
        "stack": jax.random.normal(keys[1], (3, N, N)) / 8,
        "kernel": jax.random.normal(keys[2], (3, 1, N)),
    }


def layers(p, x):
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(x @ p["in"]), p["stack"])[0]
    return lax.conv_general_dilated(h[..., None], p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def step_of(f):
    return msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).sum())


def assert_keeps(after, before):
    """Assert that a memory stayed as it was, keys apart, which are used up."""
    kept = lambda a: 0 if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    assert_trees_equal(jax.tree.map(kept, after), jax.tree.map(kept, before))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", SPARSIFIERS)
def test_no_rows_give_no_gradient_and_keep_the_memory(name, compiled):
    f = msbp.sparse_vjp(layers, SPARSIFIERS[name])
    p = params()
    step = jax.jit(step_of(f)) if compiled else step_of(f)
    before = f.init_memory(p, X)
    if compiled:  # a memory that is not 0
        _, _, before = step(p, before, X)
    before = jax.tree.map(jnp.asarray, before)
    loss, grads, after = step(p, before, X[:0])
    assert loss == 0
    assert_trees_equal(grads, jax.tree.map(jnp.zeros_like, p))
    assert_keeps(after, before)
    assert f(p, X[:0], memory=after).shape == (0, N, N)
    row = f.report(p, X[:0])
    assert {site.name for site in (*row.sparse, *row.dense)} == {"in", "stack", "kernel"}


@pytest.mark.parametrize("name", ["mean", "slot", "top_k"])
def test_a_memory_may_be_made_without_rows(name):
    """The shapes of an empty batch are enough, but where each row has a slot of its own."""
    f = msbp.sparse_vjp(layers, SPARSIFIERS[name])
    memory = f.init_memory(params(), X[:0])
    assert set(memory) == {"in", "stack", "kernel"}
    if name == "slot":
        with pytest.raises(ValueError, match=r"memory is of other shapes than this model, plan and batch"):
            step_of(f)(params(), memory, X)
    else:
        assert_trees_equal(memory, f.init_memory(params(), X))
        step_of(f)(params(), memory, X)


def test_a_feature_of_no_size_is_no_error():
    f = msbp.sparse_vjp(lambda p, x: (x @ p["none"]).sum() + (x @ p["in"]).sum(), SPARSIFIERS["mean"])
    p = {"none": jnp.ones((6, 0)), "in": params()["in"]}
    _, grads, after = msbp.value_and_grad(lambda p, m: f(p, X, memory=m))(p, f.init_memory(p, X))
    assert grads["none"].shape == (6, 0)
    assert np.abs(after["in"].residual).max() > 0


@pytest.mark.parametrize("name", ["mean", "local"])
def test_an_empty_shard(name):
    """Under shard_map with the batch on one axis: where the batch is empty, so is every shard."""
    inner = SPARSIFIERS["mean"] if name == "mean" else msbp.memorized(INNER, 0.5, reduce="local", shards=4)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    per_device = lambda p, x: lax.psum((x @ p["in"]).sum(), "d")
    f = msbp.sparse_vjp(
        lambda p, x: jax.shard_map(per_device, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())(p, x), inner
    )
    p = params()
    step = jax.jit(msbp.value_and_grad(lambda p, m, x: f(p, x, memory=m) ** 2))
    _, _, warm = step(p, f.init_memory(p, X), X)
    loss, grads, after = step(p, warm, X[:0])
    assert loss == 0
    assert_trees_equal(grads, jax.tree.map(jnp.zeros_like, p))
    assert_keeps(after, warm)


class Autoencoder(nn.Module):
    """A variational autoencoder: encode and decode are called alone too."""

    def setup(self):
        self.down, self.up, self.drop = nn.Dense(N), nn.Dense(N), nn.Dropout(0.5)

    def encode(self, x):
        return self.down(x)

    def decode(self, z):
        return self.up(z)

    def __call__(self, x, train=True):
        h = self.drop(jnp.tanh(self.encode(x)), deterministic=not train)
        return self.decode(h) if train else self.decode(h) * 1


def test_methods_of_a_linen_module_reach_their_own_sites():
    model = msbp.sparse_vjp(Autoencoder(), SPARSIFIERS["mean"])
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(keys, X)
    whole = model.init_memory(variables, X, rngs={"dropout": jax.random.key(1)})
    assert set(whole) == {"down/kernel", "up/kernel"}

    def loss(variables, memory, x, **options):
        return (model.apply(variables, x, memory=memory, **options) ** 2).mean()

    _, grads, after = msbp.value_and_grad(loss)(variables, whole, X, method="encode")
    assert_trees_equal(after["up/kernel"], whole["up/kernel"])
    assert np.abs(after["down/kernel"].residual).max() > 0
    assert not np.any(grads["params"]["up"]["kernel"])
    assert jax.jit(lambda v, m: model.apply(v, X, memory=m, method="encode"))(variables, whole).shape == (8, N)
    # Made for training, used for evaluation.
    assert model.apply(variables, X, train=False, memory=whole).shape == (8, N)
    # A method that reaches what the memory was not made for says so.
    part = model.init_memory(variables, X, method="encode")
    with pytest.raises(ValueError, match=r"lacks the sites .*from a call that reaches all that is trained"):
        model.apply(variables, X, train=False, memory=part)


class Net(nnx.Module):
    def __init__(self):
        self.down, self.up = nnx.Linear(6, N, rngs=nnx.Rngs(0)), nnx.Linear(N, N, rngs=nnx.Rngs(1))

    def __call__(self, x, deep=True):
        h = jnp.tanh(self.down(x))
        return self.up(h) if deep else h


def test_a_flag_of_an_nnx_call():
    model = msbp.sparse_vjp(Net(), SPARSIFIERS["mean"])
    model.init_memory(X)
    before = jax.tree.map(jnp.asarray, {name: v.get_value() for name, v in model.memory.items()})
    msbp.nnx.value_and_grad(lambda model, x: (model(x, deep=False) ** 2).mean())(model, X)
    after = {name: v.get_value() for name, v in model.memory.items()}
    assert_trees_equal(after["up/kernel"], before["up/kernel"])
    assert np.abs(after["down/kernel"].residual).max() > 0
    assert model(X, deep=False).shape == (8, N)


def test_more_sites_than_a_call_reaches_with_every_way_to_train():
    """Microbatches, diagnose and a vmap hand on what a call does not reach, too."""

    def f(p, x, deep):
        h = jnp.tanh(x @ p["in"])
        return h @ p["stack"][0] if deep else h

    g = msbp.sparse_vjp(f, SPARSIFIERS["mean"])
    p = params()
    memory = jax.tree.map(lambda a: a + 1, g.init_memory(p, X, True))
    loss = lambda p, m, x: (g(p, x, False, memory=m) ** 2).mean()
    for options in ({}, {"microbatches": 2}):
        _, _, after = msbp.value_and_grad(loss, **options)(p, memory, X)
        assert_trees_equal(after["stack"], memory["stack"])
        assert np.any(after["in"].residual != memory["in"].residual)
    assert set(msbp.diagnose(loss)(p, memory, X).sites) == {"in"}
    over = jax.vmap(loss, (None, None, 0))
    _, _, after = msbp.value_and_grad(lambda p, m, x: over(p, m, x).mean())(p, memory, X[:, None])
    assert_trees_equal(after["stack"], memory["stack"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "random", "slot"])
def test_disable_jit_changes_nothing(name):
    f = msbp.sparse_vjp(layers, SPARSIFIERS[name])
    p = params()
    memory = f.init_memory(p, X)
    with jax.disable_jit():
        assert_trees_equal(f.init_memory(p, X), memory)
        got = step_of(f)(p, memory, X)
        assert {site.name for site in f.report(p, X).sparse} == set(memory)
    want = step_of(f)(p, memory, X)
    bits = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    assert_trees_close(jax.tree.map(bits, got), jax.tree.map(bits, want))
