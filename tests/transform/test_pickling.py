"""Sparsifiers and wrapped models travel as bytes: to other processes, and into files."""

import copy
import pickle
import subprocess
import sys

import cloudpickle
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import assert_trees_equal

import msbp_jax as msbp

X = jax.random.normal(jax.random.key(0), (6, 8))
W = jnp.ones((8, 64))
SPARSIFIERS = {
    "dense": msbp.dense(),
    "top_k": msbp.top_k(density=0.1, rows_per_group="example"),
    "random_k": msbp.random_k(k=4, rescale=True, key=jax.random.key(3)),
    "mean": msbp.memorized(msbp.top_k(k=4), 0.8),
    "slot": msbp.memorized(msbp.top_k(k=4), 0.8, reduce="slot"),
    "local": msbp.memorized(msbp.random_k(k=4), 0.8, reduce="local", shards=2),
}
every = pytest.mark.parametrize("sparsifier", SPARSIFIERS.values(), ids=SPARSIFIERS)
journeys = pytest.mark.parametrize(
    "journey",
    [lambda x: pickle.loads(pickle.dumps(x)), lambda x: cloudpickle.loads(cloudpickle.dumps(x)), copy.deepcopy],
    ids=["pickle", "cloudpickle", "deepcopy"],
)


def product(w, x):
    return jnp.tanh(x @ w)


def as_numbers(tree):
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)


def step_of(f, call, params):
    memory = f.init_memory(params, X)
    return as_numbers(msbp.value_and_grad(lambda p, m: (call(p, m) ** 2).mean())(params, memory))


@journeys
@every
def test_sparsifiers(sparsifier, journey):
    arrived = journey(sparsifier)
    assert arrived == sparsifier
    assert repr(arrived) == repr(sparsifier)
    f, g = (msbp.sparse_vjp(product, s) for s in (sparsifier, arrived))
    assert_trees_equal(*(step_of(h, lambda p, m, h=h: h(p, X, memory=m), W) for h in (f, g)))


@journeys
@every
def test_functions(sparsifier, journey):
    f = msbp.sparse_vjp(product, {"params": sparsifier}, memory_name="carried")
    g = journey(f)
    assert_trees_equal(*(step_of(h, lambda p, m, h=h: h(p, X, carried=m), W) for h in (f, g)))


@journeys
@every
def test_linen_modules(sparsifier, journey):
    # Flax's usual initializers are functions made within others, which pickle itself does not take.
    f = msbp.sparse_vjp(nn.Dense(64, kernel_init=nn.initializers.ones), sparsifier)
    g, variables = journey(f), f.init(jax.random.key(0), X)
    assert_trees_equal(*(step_of(h, lambda p, m, h=h: h.apply(p, X, memory=m), variables) for h in (f, g)))


@journeys
@every
def test_nnx_modules(sparsifier, journey):
    model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), sparsifier)
    model.init_memory(X)
    step = msbp.nnx.value_and_grad(lambda model: (model(X) ** 2).mean())
    step(model)
    arrived = journey(model)
    results = [as_numbers((step(m), nnx.to_pure_dict(nnx.state(m)))) for m in (model, arrived)]
    assert_trees_equal(*results)


@journeys
def test_memories(journey):
    for sparsifier in SPARSIFIERS.values():
        f = msbp.sparse_vjp(product, sparsifier)
        step = msbp.value_and_grad(lambda w, m, f=f: (f(w, X, memory=m) ** 2).mean())
        memory = step(W, f.init_memory(W, X))[2]
        arrived = journey(as_numbers(memory))
        assert jax.tree.structure(arrived) == jax.tree.structure(memory)
        assert_trees_equal(arrived, as_numbers(memory))


def test_lambdas_of_a_users_own_by_cloudpickle_into_another_process(tmp_path):
    first = msbp.Sparsifier(
        init=lambda aval: (),
        apply=lambda u, s: (msbp.take_columns(u, jnp.arange(3, dtype=jnp.int32)[None], None), s),
        name="first",
    )
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(first, 0.5))
    (tmp_path / "f").write_bytes(cloudpickle.dumps(f))
    code = (
        "import pathlib, sys, cloudpickle, jax.numpy as jnp\n"
        "f = cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(f, f.init_memory(jnp.ones((8, 64)), jnp.ones((6, 8)))['params'].residual.shape)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "f")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "memorized(first, decay=0.5)" in printed
    assert "(64,)" in printed
