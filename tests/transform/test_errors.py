"""Bad input raises at the call, with what was expected, what came, and what to do."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import pytest

import msbp_jax as msbp

pytestmark = pytest.mark.leaks

S = msbp.memorized(msbp.top_k(k=4), decay=0.5)
W, X = jnp.ones((8, 64)), jnp.ones((6, 8))


def f(w, x):
    return x @ w


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({}, ValueError, r"The plan is empty. Give at least one entry"),
        (0.5, TypeError, r"takes a Sparsifier .* or a mapping .* got 0\.5"),
        ({"*": 0.5}, TypeError, r"A plan maps str to Sparsifier, got '\*': 0\.5"),
        ({1: S}, TypeError, r"A plan maps str to Sparsifier"),
    ],
)
def test_bad_plans(plan, error, message):
    with pytest.raises(error, match=message):
        msbp.sparse_vjp(f, plan)


def test_bad_settings_and_targets():
    with pytest.raises(ValueError, match=r"min_features must be at least 1 .*, got 0"):
        msbp.sparse_vjp(f, S, min_features=0)
    with pytest.raises(ValueError, match=r"no backend 'cuda'. Expected one of: .*xla"):
        msbp.sparse_vjp(f, S, backend="cuda")
    with pytest.raises(TypeError, match=r"wraps a Flax module or a function .* got 3"):
        msbp.sparse_vjp(3, S)


def test_a_pattern_that_matches_nothing():
    g = msbp.sparse_vjp(lambda p, x: x @ p["w"], {"w": S, "heads/*": msbp.dense(), "@*": S})
    with pytest.raises(ValueError, match=r"match no contraction: 'heads/\*', '@\*'.*contractions .* are: w\."):
        g.init_memory({"w": W}, X)


def test_bad_parameters():
    g = msbp.sparse_vjp(lambda p, x: x @ p["w"], S)
    with pytest.raises(ValueError, match=r"None of the parameters can be differentiated: .* got int32"):
        g.init_memory({"w": jnp.ones((8, 64), int)}, X)
    with pytest.raises(TypeError, match=r"Parameter w must be an array, got 'x'. Move it out of params"):
        g.init_memory({"w": "x"}, X)
    with pytest.raises(ValueError, match=r"has no parameters: its first argument has no leaves"):
        g.init_memory({}, X)
    with pytest.raises(ValueError, match=r"No contraction has one of the parameters \(params\) on one side"):
        msbp.sparse_vjp(lambda w, x: w * x.sum(), S).init_memory(W, X)
    with pytest.raises(ValueError, match=r"with data, which must be among the arguments: what .* closes over is a con"):
        msbp.sparse_vjp(lambda s: jax.lax.scan(lambda h, w: (h @ w, None), X, s)[0], S).init_memory(jnp.ones((3, 8, 8)))


def test_memory_of_something_else():
    g = msbp.sparse_vjp(f, S)
    memory = g.init_memory(W, X)
    with pytest.raises(TypeError, match=r"memory must be what init_memory returned.* got list"):
        g(W, X, memory=[1])
    with pytest.raises(ValueError, match=r"lacks the sites \['params'\], and has \['other'\]\..*init_memory"):
        g(W, X, memory={"other": memory["params"]})
    with pytest.raises(ValueError, match=r"lacks the sites \['params'\], and has none"):
        g(W, X, memory={})
    with pytest.raises(ValueError, match=r"site params has shape \(70,\) .* expected \(64,\)"):
        g(W, X, memory=msbp.sparse_vjp(f, S).init_memory(jnp.ones((8, 70)), X))
    with pytest.raises(ValueError, match=r"site params has another structure: expected .*MemorizedState"):
        g(W, X, memory=msbp.sparse_vjp(f, msbp.random_k(k=3)).init_memory(W, X))
    with pytest.raises(ValueError, match=r"site params has shape \(64,\) and dtype bfloat16"):
        g(W, X, memory=jax.tree.map(lambda a: a.astype(jnp.bfloat16), memory))


def test_slot_memory_of_another_batch():
    g = msbp.sparse_vjp(f, msbp.memorized(msbp.top_k(k=4), decay=0.5, reduce="slot"))
    memory = g.init_memory(W, X)
    assert g(W, X, memory=memory).shape == (6, 64)
    with pytest.raises(
        ValueError, match=r'(?s)shape \(6, 64\).*expected \(5, 64\).*reduce="slot" or "local", from another batch'
    ):
        g(W, X[:5], memory=memory)


def test_all_that_differs_is_named():
    two = msbp.sparse_vjp(lambda p, x: (x @ p["a"], x @ p["b"]), S)
    memory = two.init_memory({"a": W, "b": W}, X)
    wide = two.init_memory({"a": jnp.ones((8, 70)), "b": jnp.ones((8, 80))}, X)
    with pytest.raises(ValueError, match=r"(?s)site a has shape \(70,\).*expected \(64,\).*site b has shape \(80,\)"):
        two({"a": W, "b": W}, X, memory=wide)
    with pytest.raises(ValueError, match=r"(?s)site a has shape \(64,\).*site b has .*another model or plan"):
        two({"a": jnp.ones((8, 70)), "b": jnp.ones((8, 80))}, X, memory=memory)


@pytest.mark.parametrize("transform", [jax.grad, lambda loss: jax.vmap(jax.grad(loss), axis_size=2, in_axes=None)])
def test_differentiating_without_memory(transform):
    g = msbp.sparse_vjp(f, S)
    with pytest.raises(ValueError, match=r"f is differentiated without its memory, .* Pass memory=\.\.\."):
        transform(lambda w: g(w, X).sum())(W)
    with pytest.raises(ValueError, match=r"differentiated without its memory"):
        jax.grad(lambda w: jax.vmap(lambda x: g(w, x[None]))(X).sum())(W)
    dense = msbp.sparse_vjp(f, msbp.dense())
    assert jax.grad(lambda w: dense(w, X).sum())(W).shape == W.shape  # nothing is lost there


def test_an_nnx_module_without_memory():
    model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), S)
    assert model(X).shape == (6, 64)
    with pytest.raises(ValueError, match=r"Linear is differentiated before it has a memory.*init_memory\("):
        nnx.grad(lambda model: model(X).sum())(model)
    model.init_memory(X)
    loss, _ = msbp.nnx.value_and_grad(lambda model: model(X).mean())(model)
    assert loss == model.module(X).mean()
    with pytest.raises(ValueError, match=r"match no contraction: 'head/\*'"):
        msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), {"head/*": S}).init_memory(X)
