"""The memory's way out of the backward pass, in every shape of a training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

pytestmark = pytest.mark.leaks

S = msbp.memorized(msbp.top_k(k=6, rows_per_group=2), decay=0.8)
W = jax.random.normal(jax.random.key(0), (8, 64))
V = jax.random.normal(jax.random.key(1), (64, 64)) / 8
X = jax.random.normal(jax.random.key(2), (6, 8))


def product(w, x):
    return jnp.tanh(x @ w)


def loss_of(f):
    return lambda w, memory, x: (f(w, x, memory=memory) ** 2).mean()


def test_two_models_in_one_loss_each_keep_their_own_memory():
    f, g = msbp.sparse_vjp(product, S), msbp.sparse_vjp(product, S)
    params = {"f": W, "g": V}
    memory = {"f": f.init_memory(W, X), "nested": [g.init_memory(V, jnp.ones((6, 64)))]}

    def loss(p, m, x):
        return (g(p["g"], f(p["f"], x, memory=m["f"]), memory=m["nested"][0]) ** 2).mean()

    _, grads, after = msbp.value_and_grad(loss)(params, memory, X)
    h = msbp.sparse_vjp(lambda p, x: product(p["g"], product(p["f"], x)), S)
    both = {"f": memory["f"]["params"], "g": memory["nested"][0]["params"]}
    _, want, want_after = msbp.value_and_grad(loss_of(h))(params, both, X)
    assert_trees_equal(grads, want)
    assert_trees_equal(after["f"]["params"], want_after["f"])
    assert_trees_equal(after["nested"][0]["params"], want_after["g"])


def test_sites_that_are_not_reached_keep_their_memory():
    f, g = msbp.sparse_vjp(product, S), msbp.sparse_vjp(product, S)
    memory = {"f": f.init_memory(W, X), "g": g.init_memory(W, X)}
    memory["g"] = jax.tree.map(lambda a: a + 0.25, memory["g"])
    _, _, after = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m["f"]).mean())(W, memory, X)
    assert_trees_equal(after["g"], memory["g"])
    assert np.abs(after["f"]["params"].residual).sum() > 0
    # a result that the loss does not use
    used = lambda w, m, x: (f(w, x, memory=m["f"]).mean(), g(w, x, memory=m["g"]))
    _, _, after = msbp.value_and_grad(used, has_aux=True)(W, memory, X)
    assert_trees_equal(after["g"], memory["g"])


@pytest.mark.parametrize("sparsifier", [S, msbp.memorized(msbp.random_k(k=6), decay=0.8)])
@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_that_is_not_taken_keeps_its_memory(taken, sparsifier):
    f = msbp.sparse_vjp(lambda w, x, p: jax.lax.cond(p, lambda: product(w, x), lambda: x @ w), sparsifier)
    g = msbp.sparse_vjp(product, sparsifier)
    start = g.init_memory(W, X)
    _, _, filled = msbp.value_and_grad(loss_of(g))(W, start, X)
    names = list(f.init_memory(W, X, True))
    assert names == ["params", "params#2"]
    memory = dict.fromkeys(names, filled["params"])
    loss = lambda w, m, x, p: (f(w, x, p, memory=m) ** 2).mean()
    _, _, after = jax.jit(msbp.value_and_grad(loss))(W, memory, X, taken)
    ran, idle = ("params#2", "params") if taken else ("params", "params#2")  # JAX has the branch for False first
    assert_trees_equal(jax.tree.map(_data, after[idle]), jax.tree.map(_data, memory[idle]))
    assert not np.array_equal(_residual(after[ran]), _residual(memory[ran]))


def _residual(state):
    return np.asarray(state.residual)


def _data(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_one_memory_in_two_calls_is_their_mean():
    f = msbp.sparse_vjp(product, S)
    memory = f.init_memory(W, X)
    other = X[::-1] * 2
    siamese = lambda w, m, x: (f(w, x, memory=m) * f(w, other, memory=m)).mean()
    _, grads, after = msbp.value_and_grad(siamese)(W, memory, X)

    g = msbp.sparse_vjp(lambda w, x: product(w, x) * product(w, other), S)
    _, want, each = msbp.value_and_grad(lambda w, m, x: g(w, x, memory=m).mean())(W, g.init_memory(W, X), X)
    assert_trees_equal(grads, want)
    mean = (each["params"].residual + each["params#2"].residual) / 2
    assert_trees_close(after["params"].residual, mean)


def test_one_memory_twice_through_one_jit_is_their_mean():
    f = msbp.sparse_vjp(product, S)
    call = jax.jit(lambda w, x, m: f(w, x, memory=m))
    memory, other = f.init_memory(W, X), X[::-1] * 2
    got = msbp.value_and_grad(lambda w, m, x: (call(w, x, m) * call(w, other, m)).mean())(W, memory, X)
    want = msbp.value_and_grad(lambda w, m, x: (f(w, x, memory=m) * f(w, other, memory=m)).mean())(W, memory, X)
    assert_trees_close(got, want)
    with pytest.raises(ValueError, match=r"diagnose tells the uses of a site apart .* Call the wrapped model directly"):
        msbp.diagnose(lambda w, m, x: (call(w, x, m) * call(w, x, m)).mean())(W, memory, X)


def test_forgetting_the_memory_raises():
    f = msbp.sparse_vjp(product, S)
    with pytest.raises(ValueError, match=r"passed its memory to no wrapped model.*memory=memory"):
        msbp.value_and_grad(lambda w, m, x: product(w, x).mean())(W, f.init_memory(W, X), X)
    with pytest.raises(ValueError, match=r"differentiated without its memory"):
        msbp.value_and_grad(lambda w, m, x: f(w, x).mean())(W, f.init_memory(W, X), X)


def test_bad_losses_and_parameters():
    f = msbp.sparse_vjp(product, S)
    memory = f.init_memory(W, X)
    with pytest.raises(TypeError, match=r"must be a real scalar, got shape \(6, 64\)"):
        msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m))(W, memory, X)
    with pytest.raises(TypeError, match=r"must be a real scalar, got shape \(\) and dtype int32"):
        msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).argmax())(W, memory, X)
    with pytest.raises(TypeError, match=r"must return \(loss, aux\), got"):
        msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).mean(), has_aux=True)(W, memory, X)
    with pytest.raises(ValueError, match=r"no leaves"):
        msbp.value_and_grad(loss_of(f))({}, memory, X)
    with pytest.raises(TypeError, match=r"must be a real scalar, got tuple\. .*pass has_aux=True"):
        msbp.value_and_grad(lambda w, m, x: (f(w, x, memory=m).mean(), 3))(W, memory, X)
    with pytest.raises(TypeError, match=r"must be a real scalar, got dict"):
        msbp.value_and_grad(lambda w, m, x: {"loss": f(w, x, memory=m).mean()})(W, memory, X)
    with pytest.raises(ValueError, match=r"None of the parameters can be differentiated: .* got int32"):
        msbp.value_and_grad(lambda p, m, x: f(W, x, memory=m).mean())({"n": jnp.int32(3)}, memory, X)


def test_scan_of_steps_and_donation_equal_single_steps():
    f = msbp.sparse_vjp(product, S)
    tx = optax.sgd(0.1, momentum=0.9)
    xs = jax.random.normal(jax.random.key(5), (4, 6, 8))

    def step(carry, x):
        w, memory, opt_state = carry
        loss, grads, memory = msbp.value_and_grad(loss_of(f))(w, memory, x)
        updates, opt_state = tx.update(grads, opt_state, w)
        return (optax.apply_updates(w, updates), memory, opt_state), loss

    start = lambda: (W + 0, f.init_memory(W, X), tx.init(W))
    scanned, _ = jax.jit(functools.partial(jax.lax.scan, step))(start(), xs)
    donated, carry = jax.jit(step, donate_argnums=0), start()
    for x in xs:
        carry, _ = donated(carry, x)
    assert_trees_close(carry, scanned)


def test_the_loss_sees_arrays_only():
    """Marks are transparent to tree functions in the loss."""
    f = msbp.sparse_vjp(product, S)

    def loss(w, memory, x):
        halved = jax.tree.map(lambda leaf: leaf * 0.5, memory)
        return (f(w, x, memory=halved) ** 2).mean()

    memory = jax.tree.map(lambda leaf: leaf + 1, f.init_memory(W, X))
    half = jax.tree.map(lambda leaf: leaf * 0.5, memory)
    assert_trees_equal(msbp.value_and_grad(loss)(W, memory, X)[1:], msbp.value_and_grad(loss_of(f))(W, half, X)[1:])


def test_non_finite_gradients_are_propagated_and_not_remembered():
    f = msbp.sparse_vjp(lambda w, x: x @ w, S)
    scale = jnp.ones((6, 64)).at[2, 3].set(jnp.nan).at[4, 9].set(jnp.inf)
    loss = lambda w, m, x: (f(w, x, memory=m) * scale).sum()
    _, grads, memory = jax.jit(msbp.value_and_grad(loss))(W, f.init_memory(W, X), X)
    assert np.isfinite(np.asarray(memory["params"].residual)).all()
    plain = jax.grad(lambda w: ((X @ w) * scale).sum())(W)
    np.testing.assert_array_equal(np.isnan(grads[:, 3]), np.isnan(plain[:, 3]))
    np.testing.assert_array_equal(np.isinf(grads[:, 9]), np.isinf(plain[:, 9]))


def test_conservation_through_a_layer():
    """decay = 1, one input: the sum of sparse gradients and the memory's share make up the sum of true ones."""
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=6, rows_per_group=1), decay=1.0, reduce="slot"))
    memory, total, truth = f.init_memory(W, X), 0, 0
    for key in jax.random.split(jax.random.key(3), 7):
        target = jax.random.normal(key, (6, 64))
        loss = lambda w, m, x, target=target: (f(w, x, memory=m) * target).sum()
        _, grads, memory = msbp.value_and_grad(loss)(W, memory, X)
        total, truth = total + grads, truth + X.T @ target
    assert_trees_close(total + X.T @ memory["params"].residual, truth)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_a_float32_memory(dtype):
    f = msbp.sparse_vjp(product, S)
    w, x = W.astype(dtype), X.astype(dtype)
    memory = f.init_memory(w, x)
    _, grads, after = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).astype(jnp.float32).mean())(w, memory, x)
    assert grads.dtype == dtype
    assert memory["params"].residual.dtype == after["params"].residual.dtype == jnp.float32


def test_mixed_precision_follows_plain_jax():
    """float32 parameters, bfloat16 compute: shapes and dtypes of the gradients are the plain ones."""
    g = lambda w, x: jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
    f = msbp.sparse_vjp(g, msbp.top_k(k=63))
    grads = msbp.value_and_grad(loss_of(f))(W, f.init_memory(W, X), X)[1]
    plain = jax.grad(lambda w: (g(w, X) ** 2).mean())(W)
    assert grads.dtype == plain.dtype == jnp.float32
    cosine = jnp.vdot(grads, plain) / jnp.linalg.norm(grads) / jnp.linalg.norm(plain)
    assert cosine > 0.99


def test_through_a_jit_of_the_users_own_and_with_effects():
    def noisy(w, x):
        y = product(w, x)
        jax.debug.callback(lambda _: None, y.sum())
        return y

    f = msbp.sparse_vjp(noisy, S)
    memory = f.init_memory(W, X)
    call = jax.jit(lambda w, x, m: f(w, x, memory=m))
    want = msbp.value_and_grad(loss_of(f))(W, memory, X)
    got = msbp.value_and_grad(lambda w, m, x: (call(w, x, m) ** 2).mean())(W, memory, X)
    assert_trees_close(got, want)


def test_calls_in_a_scan_of_the_users_own():
    """Over time with one memory it is the mean; over layers with stacked memories each layer has its own."""
    f = msbp.sparse_vjp(product, S)
    xs = jax.random.normal(jax.random.key(7), (5, 6, 64))
    memory = f.init_memory(V, xs[0])
    over_time = lambda w, m, xs: jax.lax.scan(lambda c, x: (c + (f(w, x, memory=m) ** 2).mean(), None), 0.0, xs)[0]
    after = msbp.value_and_grad(over_time)(V, memory, xs)[2]
    each = [msbp.value_and_grad(loss_of(f))(V, memory, x)[2]["params"].residual for x in xs]
    assert_trees_close(after["params"].residual, sum(each) / 5)

    ws = jnp.stack([V, V * 0.5, V * 0.7])
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), memory)
    layers = lambda ws, ms, x: (jax.lax.scan(lambda h, s: (f(s[0], h, memory=s[1]), None), x, (ws, ms))[0] ** 2).mean()
    after = msbp.value_and_grad(layers)(ws, stack, xs[0])[2]
    g = msbp.sparse_vjp(lambda ws, x: jax.lax.scan(lambda h, w: (product(w, h), None), x, ws)[0], S)
    assert_trees_close(after, msbp.value_and_grad(loss_of(g))(ws, g.init_memory(ws, xs[0]), xs[0])[2])


def test_double_precision():
    with jax.enable_x64(True):
        w, x = np.asarray(W, np.float64), np.asarray(X, np.float64)
        f = msbp.sparse_vjp(product, S)
        _, grads, memory = msbp.value_and_grad(loss_of(f))(jnp.asarray(w), f.init_memory(w, x), jnp.asarray(x))
        assert grads.dtype == jnp.float64
        assert memory["params"].residual.dtype == jnp.float32


X5 = jax.random.normal(jax.random.key(8), (5, 8))
STACKED = jnp.stack([W[:8, :8], W[:8, 8:16]])
# What stands between the differentiation and the call, with the memory closed over or handed in.
BETWEEN = {
    "nothing": lambda call, w: call(w),
    "jit": lambda call, w: jax.jit(call)(w),
    "checkpoint": lambda call, w: jax.checkpoint(call)(w),
    "cond": lambda call, w: jax.lax.cond(w.sum() > -1e9, call, lambda w: 0.0, w),
    "loop": lambda call, w: jax.lax.fori_loop(0, 1, lambda _, c: (c[0], c[1] + call(c[0])), (w, 0.0))[1],
    "jit in checkpoint in vmap": lambda call, w: jax.vmap(jax.checkpoint(jax.jit(call)), axis_size=1, in_axes=None)(
        w
    ).sum(),
}


@pytest.mark.slow
@pytest.mark.parametrize("outer", [lambda step: step, jax.jit], ids=["eager", "compiled"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
def test_a_memory_that_is_closed_over(between, frozen, outer):
    """Whether memory and weight come in as arguments or by closure changes nothing."""
    f = msbp.sparse_vjp(lambda p, x: jnp.tanh(x @ p["w"]) * (x @ p["frozen"]), S)
    params = {"w": W, "frozen": W[::-1]}
    memory = f.init_memory(params, X5)

    def loss_fn(between):
        def loss(w, m, x):
            call = lambda w: f({"w": w, "frozen": w if frozen else params["frozen"]}, x, memory=m).sum()
            return between(call, w)

        return loss

    got, want = (outer(msbp.value_and_grad(loss_fn(b)))(W, memory, X5) for b in (BETWEEN[between], BETWEEN["nothing"]))
    assert_trees_close(got, want)
    assert got[2]["w"].residual.any()


def test_a_memory_that_a_scan_over_weights_closes_over():
    f = msbp.sparse_vjp(lambda w, h: jnp.tanh(h @ w), msbp.memorized(msbp.top_k(k=2), decay=0.8), min_features=1)
    memory = f.init_memory(STACKED[0], X5)
    scanned = lambda s, m, h: jax.lax.scan(lambda h, w: (f(w, h, memory=m), None), h, s)[0].sum()
    unrolled = lambda s, m, h: f(s[1], f(s[0], h, memory=m), memory=m).sum()
    got, want = (msbp.value_and_grad(loss)(STACKED, memory, X5) for loss in (scanned, unrolled))
    assert_trees_close(got, want)
    assert got[2]["params"].residual.any()
