"""Where no sparsifier of a plan has a state there is nothing to carry: wrapping is the only line that changes."""

import flax.linen as nn
import flax.nnx as nnx
import flax.training.train_state
import jax
import jax.numpy as jnp
import optax
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

TOP = msbp.top_k(k=6, rows_per_group=2)
X = jax.random.normal(jax.random.key(0), (6, 8))
W = jax.random.normal(jax.random.key(1), (8, 64))
WITH_STATE = [msbp.memorized(TOP, 0.5), msbp.random_k(k=6), msbp.memorized(TOP, 0.5, reduce="slot")]
WITH_STATE.append(msbp.memorized(TOP, 0.5, reduce="local", shards=2))


def product(w, x):
    return jnp.tanh(x @ w)


@pytest.mark.parametrize(
    "around", [lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda w: jax.vmap(f, axis_size=1, in_axes=None)(w)[0]]
)
def test_functions(around):
    f = msbp.sparse_vjp(product, TOP)
    loss = lambda call: lambda w: (around(call)(w) ** 2).mean()
    got = jax.value_and_grad(loss(lambda w: f(w, X)))(W)
    want = msbp.value_and_grad(lambda w, m: (f(w, X, memory=m) ** 2).mean())(W, f.init_memory(W, X))[:2]
    assert_trees_close(got, want)
    dense = jax.grad(loss(lambda w: product(w, X)))(W)
    assert not jnp.allclose(got[1], dense)
    assert_trees_equal(f(W, X), product(W, X))


def test_value_and_grad_asks_for_none():
    f = msbp.sparse_vjp(product, TOP)
    loss, grads, memory = msbp.value_and_grad(lambda w, m, x: (f(w, x) ** 2).mean())(W, {}, X)
    assert memory == {}
    assert_trees_equal(grads, jax.grad(lambda w: (f(w, X) ** 2).mean())(W))
    with_empty_states = msbp.value_and_grad(lambda w, m, x: (f(w, x) ** 2).mean())(W, f.init_memory(W, X), X)
    assert_trees_equal((loss, grads), with_empty_states[:2])


class Net(nn.Module):
    """A layer, batch statistics, and a head."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.relu(nn.Dense(64)(x)))
        return nn.Dense(10)(x)


@pytest.mark.parametrize("sparsifier", [None, msbp.top_k(k=64), TOP], ids=str)
def test_a_linen_program_as_flax_s_examples_have_it(sparsifier):
    """Flax's own TrainState and jax.value_and_grad: nothing but the wrapping is changed."""
    model = Net() if sparsifier is None else msbp.sparse_vjp(Net(), sparsifier)
    variables = model.init(jax.random.key(0), X)
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1)
    )

    @jax.jit
    def step(state, statistics):
        def loss_fn(params):
            y, changed = state.apply_fn({"params": params, "batch_stats": statistics}, X, mutable=["batch_stats"])
            return (y**2).mean(), changed["batch_stats"]

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), statistics, loss

    statistics, losses = variables["batch_stats"], []
    for _ in range(8):
        state, statistics, loss = step(state, statistics)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    loss = lambda m: lambda p: (m.apply({**variables, "params": p}, X, mutable=["batch_stats"])[0] ** 2).mean()
    sparse, dense = (jax.grad(loss(m))(variables["params"])["Dense_0"]["kernel"] for m in (model, Net()))
    assert jnp.array_equal(sparse, dense) == (sparsifier is not TOP)


def test_nnx():
    model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), TOP)
    loss = lambda model: (model(X) ** 2).mean()
    _, grads = nnx.value_and_grad(loss)(model)  # no init_memory, no warning
    assert (grads["module"]["kernel"][...] == 0).any()
    assert_trees_equal(jax.tree.leaves(msbp.nnx.value_and_grad(loss)(model)[1]), jax.tree.leaves(grads))
    model.init_memory(X)
    assert_trees_equal(jax.tree.leaves(nnx.value_and_grad(loss)(model)[1]), jax.tree.leaves(grads))


@pytest.mark.parametrize("sparsifier", WITH_STATE, ids=str)
def test_a_state_must_be_carried(sparsifier):
    f = msbp.sparse_vjp(product, sparsifier)
    with pytest.raises(ValueError, match=r"differentiated without its memory"):
        jax.grad(lambda w: f(w, X).mean())(W)
    model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), sparsifier)
    with pytest.raises(ValueError, match=r"before it has a memory"):
        nnx.grad(lambda model: model(X).mean())(model)


class Coder(nnx.Module):
    """A module with methods of its own."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(8, 64, rngs=rngs)
        self.decoder = nnx.Linear(64, 80, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def encode(self, x, scale=1.0):
        self.calls[...] += 1
        return nnx.relu(self.encoder(x)) * scale

    def __call__(self, x):
        return self.decoder(self.encode(x))


@pytest.mark.parametrize("sparsifier", [TOP, WITH_STATE[0]], ids=["top_k", "memorized"])
def test_methods_of_an_nnx_module(sparsifier):
    model, plain = msbp.sparse_vjp(Coder(nnx.Rngs(0)), sparsifier), Coder(nnx.Rngs(0))
    model.init_memory(X)
    loss = lambda model: (model.encode(X, scale=2.0) ** 2).mean()
    value, grads = msbp.nnx.value_and_grad(loss)(model)
    want, dense = nnx.value_and_grad(loss)(plain)
    assert value == want
    assert model.module.calls[...] == plain.calls[...] == 1
    assert (grads["module"]["encoder"]["kernel"][...] == 0).any()
    assert not grads["module"]["decoder"]["kernel"][...].any()
    assert not jnp.allclose(grads["module"]["encoder"]["kernel"][...], dense["encoder"]["kernel"][...])
    if sparsifier is not TOP:
        assert model.memory["encoder/kernel"].get_value().residual.any()
        assert not model.memory["decoder/kernel"].get_value().residual.any()
    assert set(model.init_memory(X, method="encode")) == {"encoder/kernel"}
    assert [row.name for row in model.report(X, method="encode").sparse] == ["encoder/kernel"]
    with pytest.raises(AttributeError, match=r"has no attribute 'missing'; the plain module is its \.module"):
        _ = model.missing


def test_one_choice_reads_alike_everywhere():
    whole = msbp.top_k(k=6, rows_per_group=None)
    assert repr(whole) == "top_k(k=6, rows_per_group=None)"
    assert repr(msbp.top_k(k=6, rows_per_group="example")) == 'top_k(k=6, rows_per_group="example")'
    report = msbp.sparse_vjp(product, whole).report(W, X)
    assert report.sparse[0].one_group
    assert "None" in str(report)


def test_a_pattern_that_names_nothing_is_not_silently_dense():
    f = msbp.sparse_vjp(lambda p, x: x @ p["w"] if x.ndim == 2 else x @ p["other"], {"wrong": TOP})
    params = {"w": W, "other": W}
    with pytest.raises(ValueError, match=r"match no contraction or parameter: 'wrong'.*parameters .* are: w, other"):
        jax.grad(lambda p: f(p, X).sum())(params)
    model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), {"wrong": TOP})
    with pytest.raises(ValueError, match=r"match no contraction or parameter: 'wrong'"):
        model(X)
    # What another call of the model reaches, or an earlier pattern has, is not wrong.
    f = msbp.sparse_vjp(f.function, {"other": TOP, "@dot_general_7": TOP})
    assert_trees_equal(f(params, X), X @ W)


def test_a_call_in_which_nothing_is_sparse_says_so():
    f = msbp.sparse_vjp(product, TOP, min_features=100)
    with pytest.warns(
        UserWarning, match=r"Nothing is sparse under this plan\. params: 64 features, fewer than min_feat"
    ):
        f(W, X)
    assert_trees_equal(msbp.sparse_vjp(product, msbp.top_k(k=64))(W, X), product(W, X))
