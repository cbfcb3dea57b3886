"""Sparse weights in programs around the product, of every dtype, and with the rest of the library."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from twins import assert_trees_equal

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

ROUNDING = {"float32": 3e-4, "float16": 3e-2, "bfloat16": 1e-1, "float64": 1e-9}


def layers(p, x):
    return jnp.sin(x @ p["kernel"]) @ p["kernel"].T


def over_time(f):
    """Return a loop over the rows, from the last one on."""
    return lambda p, x: jax.lax.scan(lambda carry, row: (carry + 1, f(p, row[None])[0]), 0, x, reverse=True)[1]


def within_while(f):
    """Return a loop of two rounds whose carry goes through the layer."""
    return lambda p, x: jax.lax.fori_loop(0, 2, lambda _, x: f(p, x), x)


PROGRAMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat in jit": lambda f: jax.jit(jax.checkpoint(f)),
    "vmap": lambda f: jax.vmap(f, in_axes=(None, 0)),
    "rows from the last": over_time,
    "remat in a scan": lambda f: over_time(jax.checkpoint(f)),
    "loop": within_while,
    "cond": lambda f: lambda p, x: jax.lax.cond(x[0, 0] > 0, f, lambda p, x: 2 * f(p, x), p, x),
    "switch": lambda f: lambda p, x: jax.lax.switch(1, [f, lambda p, x: 3 * f(p, x)], p, x),
}


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(PROGRAMS)),
    st.sampled_from(sorted(ROUNDING)),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(2, 30),
    st.floats(0.02, 0.8),
    st.integers(0, 3),
)
def test_every_program_and_dtype(program, dtype, rows, m, n, share, seed):
    """Tied weights, so that both directions of a product occur."""
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        mask = np.random.default_rng(seed).random((m, n)) < share
        mask[seed % m, seed % n] = True
        mask[0, (seed + 1) % n] = False
        if not mask.any():
            return
        w = random_gradient(seed, m, n).astype(dtype) / 4
        x = random_gradient(seed + 9, rows, m).astype(dtype)
        sparse = msbp.prune({"params": {"kernel": w}}, masks={"kernel": mask})
        f = PROGRAMS[program](layers)
        g = msbp.sparse_weights(f)
        arguments = x[:, None] if program == "vmap" else x
        loss = lambda y: jnp.sum(jnp.cos(y.astype(wide)))
        of_sparse = lambda p, x: loss(g(p, sparse["sparsity"], x))
        got, dx = jax.jit(jax.grad(of_sparse, (0, 1)))(sparse["params"], arguments)
        assert got["kernel"].dtype == w.dtype
        dense = {"kernel": np.where(mask, w, np.zeros((), w.dtype))}
        want, want_dx = jax.jit(jax.grad(lambda p, x: loss(f(p, x)), (0, 1)))(dense, arguments)
        found = msbp.densify({**sparse, "params": got})["params"]["kernel"]
        scale = 1 + float(jnp.abs(want["kernel"]).max()) + float(jnp.abs(want_dx).max())
        close = lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), atol=ROUNDING[dtype] * scale
        )
        close(found, jnp.where(mask, want["kernel"], 0))
        close(dx, want_dx)


def test_an_ensemble_of_weights():
    """A vmap over parameters and patterns, both of them stacked."""
    x, w = random_gradient(0, 6, 20), random_gradient(1, 3 * 20, 30).reshape(3, 20, 30)
    sparse = msbp.prune({"params": {"kernel": w}}, density=0.2, stacked=["kernel"])
    g = msbp.sparse_weights(lambda p, x: jnp.sin(x @ p["kernel"]))
    mapped = jax.vmap(g, in_axes=(0, 0, None))
    loss = lambda p: jnp.sum(mapped(p, sparse["sparsity"], x) ** 2)
    dense = msbp.densify(sparse)["params"]["kernel"]
    np.testing.assert_allclose(mapped(sparse["params"], sparse["sparsity"], x), jnp.sin(x @ dense), atol=1e-4)
    got = msbp.densify({**sparse, "params": jax.grad(loss)(sparse["params"])})["params"]["kernel"]
    want = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w) ** 2))(dense)
    np.testing.assert_allclose(got, jnp.where(dense != 0, want, 0), rtol=1e-3, atol=1e-3)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(48)(x))
        return nn.Dense(24)(x)


X, Y = random_gradient(0, 16, 32), jnp.arange(16) % 24
SPARSE = msbp.prune(MLP().init(jax.random.key(1), X), density=0.15)


def cross_entropy(model, sparsity=SPARSE["sparsity"]):
    """Return a loss of values and memory."""

    def loss_fn(params, memory, x, y):
        logits = model.apply({"params": params, "sparsity": sparsity}, x, memory=memory)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss_fn


def wrapped(plan):
    return msbp.sparse_weights(msbp.sparse_vjp(MLP(), plan, min_features=1))


MEMORIZED = msbp.memorized(msbp.top_k(k=6, rows_per_group=4), decay=0.5)
PLANS = {
    "memory": MEMORIZED,
    "rows at the outputs": {"@outputs": msbp.sample_rows(density=0.5), "*": msbp.skip_zero_rows()},
    "rows, then columns": {"@outputs": msbp.sample_rows(density=0.5), "*": msbp.top_k(k=6, rows_per_group=4)},
    "one product": msbp.split(dx=msbp.dense(), dw=msbp.top_k(k=6, rows_per_group=4)),
    "random entries": msbp.sample_entries(density=0.3),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_those_of_a_dense_weight(name):
    """Gradients are those of `sparse_vjp` on the dense weight, at the entries."""
    model = wrapped(PLANS[name])
    plain = msbp.sparse_vjp(MLP(), PLANS[name], min_features=1)
    dense = msbp.densify(SPARSE)
    loss = lambda params, memory: jnp.sum(jnp.sin(plain.apply({"params": params}, X, memory=memory)))
    sparse_loss = lambda params, memory: jnp.sum(jnp.sin(model.apply({**SPARSE, "params": params}, X, memory=memory)))
    _, got, _ = jax.jit(msbp.value_and_grad(sparse_loss))(SPARSE["params"], model.init_memory(SPARSE, X))
    _, want, _ = jax.jit(msbp.value_and_grad(loss))(dense["params"], plain.init_memory(dense, X))
    kept = jax.tree.map(jnp.ones_like, SPARSE["params"])
    kept = msbp.densify({**SPARSE, "params": kept})["params"]
    found = msbp.densify({**SPARSE, "params": got})["params"]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.tree.map(jnp.multiply, want, kept)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_microbatches_leave_patterns_whole():
    """As arguments of the loss, by place and by keyword, and closed over: all alike."""
    model = wrapped(MEMORIZED)
    memory = model.init_memory(SPARSE, X[:4])
    over = lambda loss: jax.jit(msbp.value_and_grad(loss, microbatches=4))
    closed = over(cross_entropy(model))(SPARSE["params"], memory, X, Y)
    given_too = lambda params, memory, sparsity, x, y: cross_entropy(model, sparsity)(params, memory, x, y)
    by_keyword = lambda params, memory, x, y, *, sparsity: cross_entropy(model, sparsity)(params, memory, x, y)
    assert_trees_equal(over(given_too)(SPARSE["params"], memory, SPARSE["sparsity"], X, Y), closed)
    assert_trees_equal(over(by_keyword)(SPARSE["params"], memory, X, Y, sparsity=SPARSE["sparsity"]), closed)


def test_a_train_state():
    """Values and memory in the state, patterns beside the batch; the loss goes down, and nothing compiles twice."""
    model = wrapped(MEMORIZED)
    state = msbp.TrainState.create(
        apply_fn=model.apply,
        params=jax.tree.map(jnp.copy, SPARSE["params"]),
        tx=optax.adam(1e-2),
        memory=model.init_memory(SPARSE, X),
    )

    def loss_fn(params, memory, sparsity, x, y):
        return cross_entropy(model, sparsity)(params, memory, x, y)

    step, losses = msbp.train_step(loss_fn), []
    with jax.numpy_dtype_promotion("standard"):  # as Optax has it
        for at in range(20):
            state, loss = step(state, SPARSE["sparsity"], X, Y)
            losses.append(float(loss))
            if at == 1:  # the first step's count is a Python number
                compiled = step._cache_size()
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == compiled
    assert all(leaf.shape == (entries,) for leaf, entries in zip(
        (state.params["Dense_0"]["kernel"], state.opt_state[0].mu["Dense_1"]["kernel"]), (230, 173), strict=True
    ))  # fmt: skip


def test_diagnose_compares_entries():
    """All kept and nothing remembered, the cosine is 1; with little kept it is not."""
    for k, low, high in ((48, 0.9999, 1.0001), (3, 0.1, 0.99)):
        model = wrapped(msbp.memorized(msbp.top_k(k=min(k, 24)), decay=0.5))
        whole = msbp.sparse_weights(
            msbp.sparse_vjp(MLP(), msbp.top_k(density=1.0) if k == 48 else msbp.top_k(k=k), min_features=1)
        )
        told = msbp.diagnose(cross_entropy(whole))(SPARSE["params"], whole.init_memory(SPARSE, X), X, Y)
        assert low < told.cosine < high
        if k == 48:
            continue
        told = msbp.diagnose(cross_entropy(model))(SPARSE["params"], model.init_memory(SPARSE, X), X, Y)
        assert sorted(told.sites) == ["Dense_0/kernel", "Dense_1/kernel"]
        assert told.sites["Dense_0/kernel"].density == pytest.approx(3 / 48)
        assert told.sites["Dense_0/kernel"].memory_norm > 0


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_data_on_an_explicit_mesh():
    """Axes of the explicit kind: the batch's stays with the result, and gradients are added up."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    model = msbp.sparse_weights(MLP())
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("d")))
        sparse = jax.device_put(SPARSE, NamedSharding(mesh, PartitionSpec()))
        loss = lambda p, s, x: jnp.sum(jnp.sin(model.apply({"params": p, "sparsity": s}, x)))
        value, grads = jax.jit(jax.value_and_grad(loss))(sparse["params"], sparse["sparsity"], x)
    want_value, want = jax.value_and_grad(loss)(SPARSE["params"], SPARSE["sparsity"], X)
    np.testing.assert_allclose(value, want_value, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_patterns_that_do_not_fit_are_refused():
    """Before anything is traced: arrays of other lengths, and blocks where there are none."""
    model = msbp.sparse_weights(MLP())
    pattern = SPARSE["sparsity"]["Dense_0"]["kernel"]
    cut = pattern.replace(starts=pattern.starts[:-1])
    changed = {**SPARSE["sparsity"], "Dense_0": {"kernel": cut}}
    with pytest.raises(ValueError, match=r"Dense_0/kernel: the starts of its pattern, of a weight 32 x 48"):
        model.apply({**SPARSE, "sparsity": changed}, X)
    with pytest.raises(ValueError, match=r'backend="tiles" multiplies blocks, and the entries of Dense_0/kernel stand'):
        msbp.sparse_weights(MLP(), backend="tiles").apply(SPARSE, X)
    blocks = msbp.prune(MLP().init(jax.random.key(1), X), density=0.25, block=(8, 8))
    tiled = msbp.sparse_weights(MLP(), backend="tiles").apply(blocks, X)
    np.testing.assert_allclose(tiled, model.apply(blocks, X), rtol=1e-3, atol=1e-4)
