"""The ready-made state and step, and the look at how near the gradients are."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

X = jax.random.normal(jax.random.key(2), (8, 8))
Y = jnp.arange(8) % 3


class MLP(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(3)(x)


def setup(sparsifier, has_aux=False):
    model = msbp.sparse_vjp(MLP(), sparsifier)
    variables = model.init(jax.random.key(0), X)

    def loss_fn(params, memory, batch):
        logits = model.apply({"params": params}, batch["x"], memory=memory)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return (loss, logits) if has_aux else loss

    return loss_fn, variables["params"], model.init_memory(variables, X)


BATCH = {"x": X, "y": Y}
S = msbp.memorized(msbp.top_k(k=6, rows_per_group=2), decay=0.8)


def test_train_step_equals_the_loop_written_out():
    loss_fn, params, memory = setup(S)
    tx, grad = optax.sgd(0.1, momentum=0.9), jax.jit(msbp.value_and_grad(loss_fn))
    for given in (None, tx):
        copy = jax.tree.map(jnp.copy, (params, memory))
        state = msbp.TrainState.create(apply_fn=None, params=copy[0], tx=tx, memory=copy[1])
        step = msbp.train_step(loss_fn, given)
        p, m, opt = params, memory, tx.init(params)
        for _ in range(3):
            state, loss = step(state, BATCH)
            want, grads, m = grad(p, m, BATCH)
            updates, opt = tx.update(grads, opt, p)
            p = optax.apply_updates(p, updates)
            assert_trees_close(loss, want)
        assert_trees_close((state.params, state.memory, state.opt_state), (p, m, opt))
        assert int(state.step) == 3


def test_train_step_with_aux_and_a_skipped_memory():
    loss_fn, params, memory = setup(S, has_aux=True)
    state = msbp.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1), memory=memory)
    kept = state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, params))
    assert_trees_equal(kept.memory, memory)
    state, (loss, logits) = msbp.train_step(loss_fn, has_aux=True)(state, BATCH)
    assert loss.shape == ()
    assert logits.shape == (8, 3)


def test_state_survives_flax_serialization():
    loss_fn, params, memory = setup(S)
    state = msbp.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1), memory=memory)
    state, _ = msbp.train_step(loss_fn)(state, BATCH)
    blank = jax.tree.map(jnp.zeros_like, state)
    assert_trees_equal(flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state)).memory, state.memory)


def test_train_step_compiles_once():
    loss_fn, params, memory = setup(S)
    state = msbp.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9), memory=memory)
    step = msbp.train_step(loss_fn)
    for _ in range(4):
        state, _ = step(state, BATCH)
    assert step._cache_size() <= 2  # TrainState.create has a Python int for its first step, as in Flax


@pytest.mark.parametrize("sparsifier", [S, msbp.top_k(k=6, rows_per_group=2), msbp.random_k(k=6)])
def test_diagnose_against_the_gradients_themselves(sparsifier):
    loss_fn, params, memory = setup(sparsifier)
    diagnosis = jax.jit(msbp.diagnose(loss_fn))(params, memory, BATCH)
    _, sparse, after = msbp.value_and_grad(loss_fn)(params, memory, BATCH)
    dense_fn, _, empty = setup(msbp.dense())
    _, true, _ = msbp.value_and_grad(dense_fn)(params, empty, BATCH)
    flat = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (sparse, true)]
    kernels = [tree["Dense_0"]["kernel"].ravel() for tree in (sparse, true)]
    cosine = lambda a, b: a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    np.testing.assert_allclose(diagnosis.cosine, cosine(*flat), rtol=1e-5)
    (site,) = diagnosis.sites.values()
    assert list(diagnosis.sites) == ["Dense_0/kernel"]
    np.testing.assert_allclose(site.cosine, cosine(*kernels), rtol=1e-5)
    assert 0 < site.density <= 6 / 64
    want = jnp.linalg.norm(after["Dense_0/kernel"].residual) if sparsifier is S else 0.0
    assert (want > 0) == (sparsifier is S)
    np.testing.assert_allclose(site.memory_norm, want, rtol=1e-5)


def test_diagnose_of_a_branch_and_of_stacked_layers():
    params = {"s": jax.random.normal(jax.random.key(0), (3, 64, 64)) / 8, "w": jnp.eye(8, 64)}

    def f(p, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["w"], p["s"])
        return jax.lax.cond(x.sum() > 1e9, lambda: h @ p["s"][0], lambda: h)

    g = msbp.sparse_vjp(f, msbp.top_k(k=6))
    loss = lambda p, m, x: (g(p, x, memory=m) ** 2).mean()
    sites = msbp.diagnose(loss)(params, g.init_memory(params, X), X).sites
    assert set(sites) == {"w", "s", "s#2"}
    assert 0 < sites["s"].cosine < 1
    assert 0.05 < sites["s"].density <= 6 / 64
