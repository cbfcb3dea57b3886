"""Inside the loss a memory works as the arrays it is made of; what cannot work says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

N = 64
INNER = msbp.top_k(k=7, rows_per_group=2)
S = msbp.memorized(INNER, 0.8)
W = jax.random.normal(jax.random.key(0), (6, N)) / 3
X = jax.random.normal(jax.random.key(1), (8, 6))


@functools.cache
def wrapped(sparsifier=S):
    f = msbp.sparse_vjp(lambda w, x: jnp.tanh(x @ w), sparsifier, backend="xla")
    memory = f.init_memory(W, X)
    return f, msbp.value_and_grad(lambda w, m: (f(w, X, memory=m) ** 2).mean())(W, memory)[2]


@functools.cache
def plain_step():
    f, memory = wrapped()
    return msbp.value_and_grad(lambda w, m: (f(w, X, memory=m) ** 2).mean())(W, memory)


READ = {
    "norm": lambda m: jnp.linalg.norm(m["params"].residual),
    "tree_norm": optax.tree.norm,
    "product": lambda m: (m["params"].residual * jnp.arange(N, dtype=jnp.float32)).sum(),
    "reflected": lambda m: (1.0 - m["params"].residual).sum(),
    "matmul": lambda m: m["params"].residual @ jnp.ones(N),
    "at_left": lambda m: jnp.ones(N) @ m["params"].residual,
    "inner": lambda m: jnp.inner(m["params"].residual, m["params"].residual),
    "power": lambda m: (m["params"].residual ** 2).sum(),
    "negative": lambda m: abs(-m["params"].residual).max(),
    "compared": lambda m: jnp.where(m["params"].residual > 0, 1.0, 0.0).sum(),
    "compared_with_itself": lambda m: jnp.sum(m["params"].residual == m["params"].residual),
    "index": lambda m: m["params"].residual[3],
    "slice": lambda m: m["params"].residual[2:7].sum(),
    "method": lambda m: m["params"].residual.mean(),
    "astype": lambda m: m["params"].residual.astype(jnp.bfloat16).astype(jnp.float32).sum(),
    "at": lambda m: m["params"].residual.at[0].set(5.0).sum(),
    "iteration": lambda m: sum(m["params"].residual, jnp.zeros(())),
    "length": lambda m: jnp.asarray(float(len(m["params"].residual))),
    "shape": lambda m: jnp.asarray(float(m["params"].residual.shape[0] + m["params"].residual.ndim)),
    "asarray": lambda m: jnp.asarray(m["params"].residual).sum(),
    "stack": lambda m: jnp.stack([m["params"].residual, m["params"].residual]).sum(),
    "concatenate": lambda m: jnp.concatenate([m["params"].residual, m["params"].residual]).sum(),
    "where": lambda m: jnp.where(jnp.ones(N, bool), m["params"].residual, 0.0).sum(),
    "vmap": lambda m: jax.vmap(lambda a: a * 2)(jnp.asarray(m["params"].residual)).sum(),
    "jit": lambda m: jax.jit(lambda m: m["params"].residual.sum())(m),
    "scan": lambda m: lax.scan(lambda c, _: (c + m["params"].residual.sum(), None), 0.0, None, 3)[0],
    "cond": lambda m: lax.cond(m["params"].residual[0] > 1, lambda: 0.0, lambda: m["params"].residual.sum()),
    "tree_sum": lambda m: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(m)),
    "tree_mapped": lambda m: sum(jax.tree.leaves(jax.tree.map(lambda leaf: 3 * jnp.sum(jnp.sin(leaf)), m))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", READ)
def test_a_memory_is_read_like_arrays(name, around):
    f, memory = wrapped()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = READ[name](memory)
        step = around(msbp.value_and_grad(lambda w, m: ((f(w, X, memory=m) ** 2).mean(), READ[name](m)), has_aux=True))
        (loss, got), grads, after = step(W, memory)
        assert_trees_close(got, want)
        plain = plain_step()
        assert_trees_close((loss, grads, after), plain)
        # And as part of the loss, of whose derivative with respect to parameters it is no part.
        added = around(msbp.value_and_grad(lambda w, m: (f(w, X, memory=m) ** 2).mean() + READ[name](m) * 1.0))
        value, grads, after = added(W, memory)
        assert_trees_close((value, grads, after), (plain[0] + want, *plain[1:]))


def test_aux_holds_arrays():
    f, memory = wrapped()
    step = msbp.value_and_grad(lambda w, m: (f(w, X, memory=m).mean(), (m, {"x": m["params"]})), has_aux=True)
    for run in (step, jax.jit(step)):
        (_, (same, other)), _, _ = run(W, memory)
        assert_trees_equal(same, memory)
        assert_trees_equal(other["x"], memory["params"])
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((same, other)))


def test_numpy_and_python_read_it_too():
    f, memory = wrapped()
    ran = []

    def loss(w, m):
        assert isinstance(np.asarray(m["params"].residual), np.ndarray)
        assert float(m["params"].residual[0]) == float(memory["params"].residual[0])
        assert repr(m["params"].residual) == repr(memory["params"].residual)
        assert f"{m['params'].residual.dtype}" == "float32"
        residual = m["params"].residual
        assert {residual: "a key of a dict"}[residual] == "a key of a dict"
        assert not hasattr(residual, "nothing")
        ran.append(True)
        return f(w, X, memory=m).mean()

    msbp.value_and_grad(loss)(W, memory)
    assert ran


def test_a_memory_may_be_changed_as_a_whole():
    """Scaled, reset, cast and back: the site sees what it became."""
    f, memory = wrapped()
    plain = lambda scale: msbp.value_and_grad(lambda w, m: (f(w, X, memory=m) ** 2).mean())(
        W, jax.tree.map(lambda a: a * scale, memory)
    )
    for scale in (0.5, -2.0, 0.0):
        loss = lambda w, m, scale=scale: (f(w, X, memory=jax.tree.map(lambda a: a * scale, m)) ** 2).mean()
        if scale:
            assert_trees_close(msbp.value_and_grad(loss)(W, memory), plain(scale))
        else:  # a memory that does not depend on the one that came has nowhere to go: it stays
            assert_trees_close(msbp.value_and_grad(loss)(W, memory)[:2], plain(scale)[:2])


def test_a_state_of_two_origins_raises():
    f, memory = wrapped(msbp.memorized(msbp.random_k(k=7), 0.8))

    def loss(w, m):
        mixed = {"params": m["params"]._replace(residual=jnp.zeros(N))}
        return f(w, X, memory=mixed).mean()

    with pytest.raises(
        ValueError, match=r"memory of site params was put together inside the loss .* Pass the state on"
    ):
        msbp.value_and_grad(loss)(W, memory)


@pytest.mark.parametrize(
    "derived",
    [
        lambda f, w, m: (jax.grad(lambda x: f(w, x, memory=m).sum())(X) ** 2).mean(),
        lambda f, w, m: jax.jvp(jax.grad(lambda x: f(w, x, memory=m).sum()), (X,), (X,))[1].mean(),
        lambda f, w, m: f(w, X, memory=lax.stop_gradient(m)).mean(),
        lambda f, w, m: jax.vmap(jax.grad(lambda x: f(w, x[None], memory=m).sum()))(X).mean(),
        lambda f, w, m: lax.map(jax.grad(lambda x: f(w, x[None], memory=m).sum()), X).mean(),
    ],
    ids=["gradient_penalty", "hvp", "stop_gradient", "per_example", "in_scan"],
)
@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_memory_that_cannot_leave_raises(derived, around):
    f, memory = wrapped()
    step = around(msbp.value_and_grad(lambda w, m: derived(f, w, m)))
    with pytest.raises(ValueError, match=r"memory of site params cannot leave the backward pass.*call the plain model"):
        step(W, memory)


def test_a_gradient_penalty_of_the_plain_model():
    """What the message says to do."""
    f, memory = wrapped()

    def loss(w, m):
        penalty = jax.grad(lambda x: jnp.tanh(x @ w).sum())(X)
        return (f(w, X, memory=m) ** 2).mean() + 0.1 * (penalty**2).mean()

    _, grads, after = jax.jit(msbp.value_and_grad(loss))(W, memory)
    assert np.all(np.isfinite(grads))
    assert np.any(after["params"].residual != memory["params"].residual)


def test_an_inner_value_and_grad():
    """As in learning to learn: the inner step returns a memory of its own, which is aux of an outer one."""
    f, memory = wrapped()
    inner = msbp.value_and_grad(lambda w, m: (f(w, X, memory=m) ** 2).mean())

    def outer(w, m):
        _, grads, after = inner(w, m)
        return (jnp.tanh(X @ (w - 0.1 * grads)) ** 2).mean(), after

    (_, after), grads = jax.jit(jax.value_and_grad(outer, has_aux=True))(W, memory)
    assert_trees_close(after, inner(W, memory)[2])
    assert np.all(np.isfinite(grads))
    with pytest.raises(ValueError, match=r"memory to another msbp.value_and_grad alone.*return that memory as aux"):
        msbp.value_and_grad(outer, has_aux=True)(W, memory)
    both = lambda w, m: (f(w - 0.1 * inner(w, m)[1], X, memory=m) ** 2).mean()
    _, _, moved = msbp.value_and_grad(both)(W, memory)
    assert np.any(moved["params"].residual != memory["params"].residual)


@pytest.mark.skipif("native" not in msbp.backends()["grad_input"], reason="the native kernels were not built")
def test_second_derivatives_of_native_kernels_say_what_to_do():
    f = msbp.sparse_vjp(lambda w, x: jnp.tanh(x @ w), msbp.top_k(k=7, rows_per_group=2), backend="native")
    inner = jax.grad(lambda w: f(w, X, memory={"params": ()}).mean())
    with pytest.raises(NotImplementedError, match=r'has no derivative.*backend="xla"'):
        jax.grad(lambda w: inner(w).sum())(W)
