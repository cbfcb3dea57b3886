"""Keys: all that draws in one step draws for itself: sites, instances, shards, members, steps, microbatches, models.

Inputs are rows of the identity, so that each row of dw is a row of the gradient of the output: what was drawn for it.
"""

import functools

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import msbp_jax as msbp

pytestmark = pytest.mark.slow

DRAW = msbp.random_k(k=6, rows_per_group=None, rescale=True)
LOCAL = functools.partial(msbp.memorized, decay=0.5, reduce="local")
EYE, W = jnp.eye(8), jnp.zeros((8, 64))
KEYED = {
    "random_k": DRAW,
    "mean": msbp.memorized(DRAW, decay=0.5),
    "slot": msbp.memorized(DRAW, decay=0.5, reduce="slot"),
    "local": LOCAL(DRAW, shards=1),
}
each = pytest.mark.parametrize("sparsifier", KEYED.values(), ids=KEYED.keys())


def product(w, x):
    return x @ w


def drawn(dw, rows):
    """Return what was drawn for each of some rows of dw, as tuples of columns."""
    return [tuple(np.flatnonzero(np.asarray(dw)[row]).tolist()) for row in rows]


def keys_of(tree):
    """Return all keys of a pytree of states, one by one, as tuples of bits."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert leaves, "there are no keys to compare"
    return [tuple(bits.tolist()) for leaf in leaves for bits in np.asarray(jax.random.key_data(leaf)).reshape(-1, 2)]


def all_differ(things):
    return len(set(things)) == len(things) > 1


def grads_and_memory(f, w, memory, *args):
    return jax.jit(msbp.value_and_grad(lambda w, m, *args: f(w, *args, memory=m).sum()))(w, memory, *args)[1:]


def many_keys():
    """Return a sparsifier of a user's own, whose state holds keys in arrays of several shapes and a counter."""

    def init(aval):
        return {"pair": jax.random.split(jax.random.key(1), (2, 3)), "one": jax.random.key(1), "n": jnp.zeros(())}

    def apply(u, state):
        index = jax.random.permutation(state["pair"][1, 2], u.shape[1])[None, :6].astype(jnp.int32)
        after = jax.vmap(jax.vmap(lambda key: jax.random.split(key)[0]))(state["pair"])
        return msbp.take_columns(u, index, rows_per_group=None), state | {"pair": after}

    return msbp.Sparsifier(init=init, apply=apply, name="many keys")


@pytest.mark.parametrize("sparsifier", [*KEYED.values(), LOCAL(DRAW, shards=4)], ids=[*KEYED, "four shards"])
def test_sites_and_instances(sparsifier):
    f = msbp.sparse_vjp(
        lambda p, x: (x @ p["a"]).sum() + (x @ p["b"]).sum() + lax.map(lambda w: x @ w, p["s"]).sum(), sparsifier
    )
    params = {"a": W, "b": W, "s": jnp.zeros((3, 8, 64))}
    memory = f.init_memory(params, EYE)
    grads, after = grads_and_memory(f, params, memory, EYE)
    assert all_differ(keys_of(memory) + keys_of(after))
    assert all_differ([drawn(g, [0])[0] for g in (grads["a"], grads["b"], *grads["s"])])


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_local(shards):
    f = msbp.sparse_vjp(product, LOCAL(DRAW, shards=shards))
    memory = f.init_memory(W, EYE)
    grads, after = grads_and_memory(f, W, memory, EYE)
    rows = drawn(grads, range(8))
    size = 8 // shards
    assert all(rows[i] == rows[i - i % size] for i in range(8))
    assert all_differ(rows[::size])
    assert all_differ(keys_of(memory) + keys_of(after))


def test_keys_in_arrays_of_any_shape():
    for sparsifier in (many_keys(), msbp.memorized(many_keys(), 0.5), LOCAL(many_keys(), shards=2)):
        f = msbp.sparse_vjp(lambda p, x: (x @ p["a"]).sum() + lax.map(lambda w: x @ w, p["s"]).sum(), sparsifier)
        params = {"a": W, "s": jnp.zeros((3, 8, 64))}
        memory = f.init_memory(params, EYE)
        grads, after = grads_and_memory(f, params, memory, EYE)
        assert all_differ(keys_of(memory))
        assert len(set(keys_of(memory) + keys_of(after))) >= len(keys_of(memory)) + len(keys_of(after)) // 7
        assert all_differ([drawn(g, [0])[0] for g in (grads["a"], *grads["s"])])


@pytest.mark.parametrize("sparsifier", [DRAW, KEYED["mean"], LOCAL(DRAW, shards=2)], ids=["random_k", "mean", "local"])
def test_stacked_layers_have_a_state_each(sparsifier):
    f = msbp.sparse_vjp(lambda s, x: lax.map(lambda w: x @ w, s), sparsifier)
    stacked = jnp.zeros((4, 8, 64))
    memory = f.init_memory(stacked, EYE)
    for _ in range(2):
        grads, after = grads_and_memory(f, stacked, memory, EYE)
        assert all_differ(drawn(grads.reshape(32, 64), range(0, 32, 8)))
        assert not set(keys_of(memory)) & set(keys_of(after))
        memory = after


@each
def test_members_of_a_vmap_that_share_a_memory(sparsifier):
    f = msbp.sparse_vjp(product, sparsifier)
    memory = f.init_memory(W, EYE[:1])
    loss = lambda w, m, xs: jax.vmap(lambda x: f(w, x, memory=m))(xs).sum()
    grads, after = jax.jit(msbp.value_and_grad(loss))(W, memory, EYE[:, None])[1:]
    assert all_differ(drawn(grads, range(8)))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, memory)
    nested = lambda w, m, xs: jax.vmap(jax.vmap(lambda x: f(w, x, memory=m)))(xs).sum()
    grads = jax.jit(msbp.value_and_grad(nested))(W, memory, EYE.reshape(4, 2, 1, 8))[1]
    assert all_differ(drawn(grads, range(8)))


@each
def test_steps_of_a_scan_that_share_a_memory(sparsifier):
    f = msbp.sparse_vjp(lambda w, xs: lax.map(lambda x: x @ w, xs), sparsifier)
    memory = f.init_memory(W, EYE[:, None])
    grads, after = grads_and_memory(f, W, memory, EYE[:, None])
    assert all_differ(drawn(grads, range(8)))
    assert not set(keys_of(memory)) & set(keys_of(after))


@each
def test_uses_in_one_loss(sparsifier):
    """A model that is called twice draws twice."""
    f = msbp.sparse_vjp(product, sparsifier)
    memory = f.init_memory(W, EYE[:1])
    two = lambda w, m: (f(w, EYE[:1], memory=m) + f(w, EYE[1:2], memory=m)).sum()
    step = jax.jit(msbp.value_and_grad(two))
    grads, again = (step(W, memory)[1] for _ in range(2))
    assert all_differ(drawn(grads, [0, 1]))
    assert drawn(grads, [0, 1]) == drawn(again, [0, 1])
    with jax.debug_key_reuse(True):
        jax.jit(msbp.value_and_grad(two))(W, memory)


@each
def test_microbatches(sparsifier):
    f = msbp.sparse_vjp(product, sparsifier)
    memory = f.init_memory(W, EYE[:2])
    step = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).sum(), microbatches=4)
    grads, after = jax.jit(step)(W, memory, EYE)[1:]
    assert all_differ(drawn(grads, range(0, 8, 2)))
    assert not set(keys_of(memory)) & set(keys_of(after))


@each
def test_devices_of_a_shard_map(sparsifier):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = {"in_specs": (P(), P("d")), "out_specs": P("d"), "mesh": mesh}
    f = msbp.sparse_vjp(jax.shard_map(product, **rows), sparsifier)
    memory = f.init_memory(W, EYE)
    grads = jax.jit(msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).sum()))(W, memory, EYE)[1]
    assert all_differ(drawn(grads, range(8)))


class One(nn.Module):
    """A model of one layer."""

    name_of_layer: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name=self.name_of_layer)(x)


def test_models():
    """Two models with one sparsifier do not draw alike."""
    models = [msbp.sparse_vjp(m, DRAW) for m in (nn.Dense(64), nn.Dense(64, use_bias=False), One("a"), One("b"))]
    memories = [m.init_memory(m.init(jax.random.key(0), EYE), EYE) for m in models]
    functions = [msbp.sparse_vjp(f, DRAW) for f in (product, lambda w, x: x @ w + 1)]
    memories += [f.init_memory(W, EYE) for f in functions]
    assert all_differ(keys_of(memories))


@pytest.mark.parametrize("wrap", [lambda memories: memories, lambda memories: tuple(memories.values())])
def test_equal_models_in_one_loss_are_told_by_their_place(wrap):
    f, g = (msbp.sparse_vjp(product, DRAW) for _ in range(2))
    memories = {"f": f.init_memory(W, EYE), "g": g.init_memory(W, EYE)}

    def loss(p, m):
        one, other = m.values() if isinstance(m, dict) else m
        return f(p["f"], EYE, memory=one).sum() + g(p["g"], EYE, memory=other).sum()

    step = jax.jit(msbp.value_and_grad(loss))
    grads, after = step({"f": W, "g": W}, wrap(memories))[1:]
    assert all_differ([drawn(g, [0])[0] for g in grads.values()])
    assert all_differ(keys_of(after))


def test_equal_nnx_models_in_one_loss():
    models = [msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), DRAW) for _ in range(2)]
    for model in models:
        model.init_memory(EYE)
    both = nnx.List(models)
    grads = msbp.nnx.value_and_grad(lambda both: both[0](EYE).sum() + both[1](EYE).sum())(both)[1]
    assert all_differ([drawn(grads[i]["module"]["kernel"][...], [0])[0] for i in (0, 1)])


def test_seeds_differ_and_repeat():
    keys = {
        seed: keys_of(msbp.sparse_vjp(product, msbp.random_k(k=6, key=jax.random.key(seed))).init_memory(W, EYE))[0]
        for seed in (0, 1)
    }
    assert keys[0] != keys[1]
    assert keys[0] == keys_of(msbp.sparse_vjp(product, msbp.random_k(k=6)).init_memory(W, EYE))[0]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_key_of_the_loss_is_split_by_microbatches(legacy):
    key = jax.random.PRNGKey(0) if legacy else jax.random.key(0)
    f = msbp.sparse_vjp(product, KEYED["mean"])
    loss = lambda w, m, x, key: (f(w, x, memory=m).sum(), jax.random.normal(key))
    step = msbp.value_and_grad(loss, has_aux=True, microbatches=4)
    (_, noise), _, _ = step(W, f.init_memory(W, EYE[:2]), EYE, key)
    assert all_differ(noise.tolist())
    assert noise.tolist() == jax.vmap(jax.random.normal)(jax.random.split(key, 4)).tolist()


def through_cond(w, x):
    return lax.cond(x.sum() > 0, lambda w, x: x @ w, lambda w, x: x @ w * 2, w, x)


def through_scan(w, x):
    return lax.scan(lambda c, row: (c, row[None] @ w), 0, x)[1]


def through_vmap(w, x):
    return jax.vmap(lambda row: row[None] @ w)(x)


def through_switch_in_vmap(w, x):
    each = lambda i, row: lax.switch(i, [lambda r: r[None] @ w, lambda r: r[None] @ w * 2], row)
    return jax.vmap(each)(jnp.arange(len(x)) % 2, x)


CONSTRUCTS = {
    "plain": product,
    "scan": through_scan,
    "cond": through_cond,
    "remat": jax.checkpoint(product),
    "vmap": through_vmap,
    "switch in vmap": through_switch_in_vmap,
    "jit": jax.jit(product),
    "map": lambda w, x: lax.map(lambda row: row[None] @ w, x, batch_size=4),
}


@pytest.mark.parametrize(
    ("construct", "name", "microbatches"),
    [  # every pair of values: every other construct of a sparsifier in microbatches
        (construct, name, (None, 2)[(i + j) % 2])
        for i, construct in enumerate(CONSTRUCTS)
        for j, name in enumerate(KEYED)
    ],
)
def test_no_key_is_used_twice(construct, name, microbatches):
    """JAX's own search for keys that are used twice raises no alarm."""
    f = msbp.sparse_vjp(CONSTRUCTS[construct], KEYED[name])
    memory = f.init_memory(W, EYE[: 8 // (microbatches or 1)])
    step = jax.jit(msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).sum(), microbatches=microbatches))
    seen = keys_of(memory)
    with jax.debug_key_reuse(True):
        for _ in range(2):
            _, _, memory = step(W, memory, EYE)
            now = keys_of(memory)
            assert len(set(now)) == len(now)
            assert set(now) - set(seen)  # all but those of a branch that did not run
            seen += now


def test_the_search_still_finds_a_key_that_the_loss_uses_twice():
    f = msbp.sparse_vjp(product, DRAW)
    loss = lambda w, m, key: f(w, EYE, memory=m).sum() + jax.random.normal(key) + jax.random.uniform(key)
    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        jax.jit(msbp.value_and_grad(loss))(W, f.init_memory(W, EYE), jax.random.key(0))
