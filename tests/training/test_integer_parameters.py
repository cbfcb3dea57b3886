"""Integers, bools and keys among the parameters are constants: as for JAX, their gradient is float0."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from twins import assert_trees_close

import msbp_jax as msbp

N = 64
S = msbp.memorized(msbp.top_k(k=7, rows_per_group=2), 0.8)
KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[3], (8, 6))
PARAMS = {
    "base": jax.random.randint(KEYS[0], (6, N), -127, 127, jnp.int8),
    "a": jax.random.normal(KEYS[1], (6, 4)),
    "b": jax.random.normal(KEYS[2], (4, N)),
    "count": jnp.zeros((), jnp.int32),
    "flag": jnp.ones((3,), bool),
    "byte": jnp.ones((2,), jnp.uint8),
}
INTEGERS = {"base", "count", "flag", "byte"}


def adapted(p, x):
    """An int8 base under a low-rank update."""
    base = p["base"].astype(jnp.float32) / 127
    return x @ base + (x @ p["a"]) @ p["b"] * jnp.where(p["flag"][0], 1.0, 0.0)


def loss_of(f):
    return lambda p, m, x: (f(p, x, memory=m) ** 2).mean()


def assert_constants(grads):
    for name in INTEGERS:
        assert grads[name].dtype == jax.dtypes.float0
        assert grads[name].shape == PARAMS[name].shape


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}], ids=str)
def test_gradients_are_those_of_plain_jax(options):
    f = msbp.sparse_vjp(adapted, msbp.dense())
    step = msbp.value_and_grad(loss_of(f), **options)
    plain = jax.grad(lambda p: (adapted(p, X) ** 2).mean(), allow_int=True)(PARAMS)
    _, grads, _ = step(PARAMS, {}, X)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda g: g.dtype, plain)
    assert_constants(grads)
    compiled = jax.jit(lambda *args: {name: step(*args)[1][name] for name in "ab"})  # float0 leaves no jit
    for mine in (grads, compiled(PARAMS, {}, X)):
        assert_trees_close({name: mine[name] for name in "ab"}, {name: plain[name] for name in "ab"})


def test_sites_with_an_integer_base():
    f = msbp.sparse_vjp(adapted, S)
    memory = f.init_memory(PARAMS, X)
    assert "b" in memory
    _, grads, after = msbp.value_and_grad(loss_of(f))(PARAMS, memory, X)
    assert_constants(grads)
    assert np.any(after["b"].residual)
    rows = f.report(PARAMS, X)
    assert {row.name for row in (*rows.sparse, *rows.dense)} == {"base", "a", "b"}


@jax.numpy_dtype_promotion("standard")  # which Adam needs
def test_through_a_train_state():
    f = msbp.sparse_vjp(adapted, S)
    trainable = jax.tree.map(lambda leaf: "train" if jnp.issubdtype(leaf.dtype, jnp.floating) else "keep", PARAMS)
    tx = optax.multi_transform({"train": optax.adam(1e-2), "keep": optax.set_to_zero()}, trainable)
    state = msbp.TrainState.create(apply_fn=f, params=PARAMS, tx=tx, memory=f.init_memory(PARAMS, X))
    state = jax.tree.map(jnp.copy, state)  # whose buffers are given away
    step = msbp.train_step(loss_of(f))
    losses = []
    for _ in range(3):
        state, loss = step(state, X)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for name in INTEGERS:
        np.testing.assert_array_equal(state.params[name], PARAMS[name])
        assert state.params[name].dtype == PARAMS[name].dtype
    _, grads, memory = msbp.value_and_grad(loss_of(f))(state.params, state.memory, X)
    state = state.apply_gradients(grads=grads, memory=memory)
    for name in INTEGERS:
        np.testing.assert_array_equal(state.params[name], PARAMS[name])


def test_with_a_dynamic_scale_and_diagnose():
    f = msbp.sparse_vjp(adapted, S)
    memory = f.init_memory(PARAMS, X)
    scaled = msbp.DynamicScale().value_and_grad(loss_of(f))(PARAMS, memory, X)
    _, grads, _ = msbp.value_and_grad(loss_of(f))(PARAMS, memory, X)
    assert_trees_close({k: scaled.grads[k] for k in "ab"}, {k: grads[k] for k in "ab"})
    assert_constants(scaled.grads)
    diagnosis = msbp.diagnose(loss_of(f))(PARAMS, memory, X)
    assert "b" in diagnosis.sites


def test_a_linen_collection_of_counters():
    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("seen", lambda key: jnp.zeros((), jnp.int32))
            return nn.Dense(N)(x)

    model = msbp.sparse_vjp(Counted(), S)
    variables = model.init(jax.random.key(0), X)
    memory = model.init_memory(variables, X)
    _, grads, _ = msbp.value_and_grad(lambda v, m: (model.apply(v, X, memory=m) ** 2).mean())(variables, memory)
    assert grads["params"]["seen"].dtype == jax.dtypes.float0
    assert np.any(grads["params"]["Dense_0"]["kernel"])


def test_keys_among_parameters():
    params = {"w": jnp.ones((6, N)), "key": jax.random.key(3)}
    f = msbp.sparse_vjp(lambda p, x: (x + jax.random.normal(p["key"], x.shape)) @ p["w"], S)
    _, grads, _ = msbp.value_and_grad(loss_of(f))(params, f.init_memory(params, X), X)
    assert grads["key"].dtype == jax.dtypes.float0
