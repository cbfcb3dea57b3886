"""Every construct that the interpreter goes through, against a masked twin and against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import assert_trees_close, assert_trees_equal, masked

import msbp_jax as msbp

K, N = 7, 64
GROUPS = [1, 4, 5, None]


@functools.cache
def data(rows=12, m=10):
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w1": jax.random.normal(keys[0], (m, N)) / 3,
        "w2": jax.random.normal(keys[1], (N, N)) / 8,
        "stack": jax.random.normal(keys[2], (3, N, N)) / 8,
        "out": jax.random.normal(keys[3], (N, 1)),
        "b": jax.random.normal(keys[4], (N,)),
    }
    return params, jax.random.normal(keys[5], (rows, m))


def plain_product(a, w):
    return a @ w


def twin_product(group):
    return lambda a, w: masked(a @ w, K, group)


# Each takes (product, params, x); in the twin `product` masks the cotangent of its output.
def straight(dot, p, x):
    h = jnp.tanh(dot(x, p["w1"]) + p["b"][None])
    return dot(h, p["w2"]) @ p["out"]


def in_jit(dot, p, x):
    layer = jax.jit(lambda h, w: jax.nn.relu(dot(h, w)))
    return layer(layer(x, p["w1"]), p["w2"]) @ p["out"]


def stacked_scan(dot, p, x):
    h, ys = lax.scan(lambda h, w: (jnp.tanh(dot(h, w)), h.sum()), dot(x, p["w1"]), p["stack"])
    return h @ p["out"] + ys.sum()


def reversed_scan(dot, p, x):
    return lax.scan(lambda h, w: (jnp.tanh(dot(h, w)), None), dot(x, p["w1"]), p["stack"], reverse=True)[0] @ p["out"]


def loop_over_slices(dot, p, x):
    h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(dot(h, p["stack"][i])), dot(x, p["w1"]))
    return h @ p["out"]


def params_in_the_carry(dot, p, x):
    (h, _), _ = lax.scan(lambda c, _: ((jnp.tanh(dot(c[0], c[1])), c[1]), None), (dot(x, p["w1"]), p["w2"]), None, 3)
    return h @ p["out"]


def in_cond(dot, p, x):
    h = dot(x, p["w1"])
    return lax.cond(x[0, 0] > 100, lambda h: h, lambda h: jnp.tanh(dot(h, p["w2"])), h) @ p["out"]


def in_switch_in_scan(dot, p, x):
    def layer(h, inputs):
        w, i = inputs
        return lax.switch(i, [lambda: h, lambda: jnp.tanh(dot(h, w)), lambda: dot(jnp.sin(h), w)]), None

    return lax.scan(layer, dot(x, p["w1"]), (p["stack"], jnp.array([1, 0, 2])))[0] @ p["out"]


def in_remat(dot, p, x):
    block = jax.checkpoint(lambda h, w: jnp.tanh(dot(h, w)))
    return block(block(x, p["w1"]), p["w2"]) @ p["out"]


def remat_with_policy_in_scan(dot, p, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = jax.checkpoint(lambda h, w: (jnp.tanh(dot(h, w)), None), policy=policy)
    return lax.scan(block, dot(x, p["w1"]), p["stack"])[0] @ p["out"]


def over_custom_jvp(dot, p, x):
    return dot(jax.nn.gelu(jax.nn.silu(dot(x, p["w1"]))), p["w2"]) @ p["out"]


def cast_and_reshaped(dot, p, x):
    w = jnp.transpose(p["w2"].reshape(N // 2, 2, N), (1, 0, 2)).reshape(N, N)[::-1] * 0.5
    return dot(dot(x, p["w1"]), w) @ p["out"]


CONSTRUCTS = {
    f.__name__: f
    for f in (
        straight, in_jit, stacked_scan, reversed_scan, loop_over_slices, params_in_the_carry, in_cond,
        in_switch_in_scan, in_remat, remat_with_policy_in_scan, over_custom_jvp, cast_and_reshaped,
    )
}  # fmt: skip
construct = pytest.mark.parametrize("name", CONSTRUCTS)


def wrapped(name, sparsifier, **kwargs):
    return msbp.sparse_vjp(lambda p, x: CONSTRUCTS[name](plain_product, p, x), sparsifier, **kwargs)


@functools.cache
def plain_gradients(name):
    return jax.jit(jax.value_and_grad(lambda p, x: (CONSTRUCTS[name](plain_product, p, x) ** 2).mean()))


def sparse_gradients(f, params, x, memory=None, compiled=True):
    memory = f.init_memory(params, x) if memory is None else memory
    step = msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean())
    return (jax.jit(step) if compiled else step)(params, memory, x)


# Groups that do and do not divide the rows are the kernels' affair: three constructs have them all, the others one.
ALL_GROUPS = ("straight", "stacked_scan", "in_switch_in_scan")


@pytest.mark.parametrize(
    ("name", "group"),
    [(n, g) for i, n in enumerate(CONSTRUCTS) for g in (GROUPS if n in ALL_GROUPS else [(1, None)[i % 2]])],
)
def test_masked_twin(name, group):
    params, x = data()
    f = wrapped(name, msbp.top_k(k=K, rows_per_group=group))
    _, grads, _ = sparse_gradients(f, params, x)
    twin = lambda p: (CONSTRUCTS[name](twin_product(group), p, x) ** 2).mean()
    assert_trees_close(grads, jax.jit(jax.grad(twin))(params))
    dense = plain_gradients(name)(params, x)[1]
    assert not np.allclose(grads["w1"], dense["w1"])  # the mask bites


EVERYTHING = [msbp.dense(), msbp.top_k(k=N), msbp.memorized(msbp.top_k(density=1.0), 0.8)]


# Three constructs have every way to keep everything, the others one each, by turns.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sparsifier"),
    [(n, s) for i, n in enumerate(CONSTRUCTS) for s in (EVERYTHING if n in ALL_GROUPS else [EVERYTHING[i % 3]])],
)
def test_keeping_everything_is_plain_jax_bit_for_bit(name, sparsifier):
    params, x = data()
    f = wrapped(name, sparsifier)
    memory = f.init_memory(params, x)
    assert memory == {}
    loss, grads, _ = jax.jit(msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean()))(params, memory, x)
    assert_trees_equal((loss, grads), plain_gradients(name)(params, x))


@pytest.mark.slow
@construct
def test_decay_0_is_the_sparsifier_itself_bit_for_bit(name):
    params, x = data()
    s = msbp.top_k(k=K, rows_per_group=4)
    assert_trees_equal(
        sparse_gradients(wrapped(name, msbp.memorized(s, decay=0)), params, x),
        sparse_gradients(wrapped(name, s), params, x),
    )


LEAKS = ("stacked_scan", "in_cond")  # the search takes its time


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.leaks) for name in LEAKS), "straight", "in_jit", "in_remat"]
)
def test_eager_and_plain_grad_agree_with_compiled(name):
    params, x = data()
    f = wrapped(name, msbp.memorized(msbp.top_k(k=K, rows_per_group=4), decay=0.8))
    memory = f.init_memory(params, x)
    _, _, memory = sparse_gradients(f, params, x, memory)
    loss, grads, after = sparse_gradients(f, params, x, memory)
    assert_trees_close(sparse_gradients(f, params, x, memory, compiled=False), (loss, grads, after))
    before = jax.tree.map(np.asarray, memory)
    assert_trees_close(jax.grad(lambda p: (f(p, x, memory=memory) ** 2).mean())(params), grads)
    assert_trees_equal(jax.tree.map(np.asarray, memory), before)


@construct
def test_without_memory_it_is_the_plain_program(name):
    params, x = data()
    f = wrapped(name, msbp.memorized(msbp.top_k(k=K), decay=0.8))
    plain = lambda p, x: CONSTRUCTS[name](plain_product, p, x)
    assert str(jax.make_jaxpr(f)(params, x)) == str(jax.make_jaxpr(plain)(params, x))
    assert_trees_equal(f(params, x), plain(params, x))


@pytest.mark.slow
@construct
def test_with_memory_the_forward_compiles_to_the_plain_program(name):
    params, x = data()
    f = wrapped(name, msbp.memorized(msbp.top_k(k=K), decay=0.8))
    memory = f.init_memory(params, x)
    sparse = jax.jit(lambda p, x: f(p, x, memory=memory))
    plain = jax.jit(lambda p, x: CONSTRUCTS[name](plain_product, p, x))
    assert_trees_equal(sparse(params, x), plain(params, x))
    dots = [t.lower(params, x).as_text().count("stablehlo.dot_general") for t in (sparse, plain)]
    assert dots[0] == dots[1]


SITES = {
    "straight": {"w1": (N,), "w2": (N,)},
    "in_jit": {"w1": (N,), "w2": (N,)},
    "stacked_scan": {"w1": (N,), "stack": (3, N)},
    "reversed_scan": {"w1": (N,), "stack": (3, N)},
    "loop_over_slices": {"w1": (N,), "stack": (3, N)},
    "params_in_the_carry": {"w1": (N,), "w2": (N,)},
    "in_cond": {"w1": (N,), "w2": (N,)},
    "in_switch_in_scan": {"w1": (N,), "stack": (3, N), "stack#2": (3, N)},
    "in_remat": {"w1": (N,), "w2": (N,)},
    "remat_with_policy_in_scan": {"w1": (N,), "stack": (3, N)},
    "over_custom_jvp": {"w1": (N,), "w2": (N,)},
    "cast_and_reshaped": {"w1": (N,), "w2": (N,)},
}


@construct
def test_sites_and_shapes_of_their_memory(name):
    params, x = data()
    f = wrapped(name, msbp.memorized(msbp.top_k(k=K), decay=0.8))
    shapes = {site: state.residual.shape for site, state in f.init_memory(params, x).items()}
    assert shapes == SITES[name]
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
    assert_trees_equal(f.init_memory(*abstract), f.init_memory(params, x))


@pytest.mark.slow
@construct
def test_a_second_step_does_not_compile(name):
    params, x = data()
    f = wrapped(name, msbp.memorized(msbp.random_k(k=K, rows_per_group=4), decay=0.8))
    traces = []

    @jax.jit
    def step(params, memory, x):
        traces.append(1)
        return msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean())(params, memory, x)

    memory = f.init_memory(params, x)
    for _ in range(3):
        _, _, memory = step(params, memory, x)
    assert len(traces) == 1


@pytest.mark.slow
@construct
def test_vmap_over_examples_and_over_models(name):
    """A vmap around the model chooses within each example; a vmap over models has a memory each."""
    params, x = data()
    f = wrapped(name, msbp.memorized(msbp.top_k(k=K, rows_per_group=None), decay=0.8))
    xs = np.stack([x, x + 0.5])
    memory = f.init_memory(params, x)
    loss = lambda p, m, x: (f(p, x, memory=m) ** 2).mean()
    one = jax.jit(msbp.value_and_grad(loss))
    each = [one(params, memory, x) for x in xs]

    @jax.jit
    def mapped(params, memory, xs):
        both = msbp.value_and_grad(lambda p, m, xs: jax.vmap(loss, (None, None, 0))(p, m, xs).mean())
        return both(params, memory, xs), jax.vmap(msbp.value_and_grad(loss), (None, None, 0))(params, memory, xs)

    both, ensemble = mapped(params, memory, xs)
    half = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, each[0], each[1])
    assert_trees_close(both[:2], half[:2])
    assert_trees_close(ensemble, jax.tree.map(lambda a, b: np.stack([a, b]), each[0], each[1]))
