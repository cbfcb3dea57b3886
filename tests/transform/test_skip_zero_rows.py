"""Skipping rows that are exactly 0 changes nothing but the time: every kind of model, under every transformation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

SKIP = msbp.skip_zero_rows()
ROWS, M, N = 24, 6, 32
MASKS = {
    "no row is 0": jnp.ones(ROWS),
    "half of them are": (jnp.arange(ROWS) % 2).astype(jnp.float32),
    "all but one are": (jnp.arange(ROWS) == 7).astype(jnp.float32),
    "all are": jnp.zeros(ROWS),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
X = random_gradient(0, ROWS, M)
PARAMS = {
    "a": random_gradient(1, M, N) / 4,
    "b": random_gradient(2, 1, N)[0],
    "c": random_gradient(3, N, N) / 8,
    "stack": random_gradient(4, 3 * N, N).reshape(3, N, N) / 8,
    "out": random_gradient(5, N, 3),
}


def mlp(p, x):
    h = jnp.tanh(x @ p["a"] + p["b"][None, :])
    return jnp.tanh(h @ p["c"]) @ p["out"]


def stacked(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["stack"])[0] @ p["out"]


def recurrent(p, x):
    """Steps over time, of four examples."""
    step = lambda h, x: (jnp.tanh(x @ p["a"] + h @ p["c"]), jnp.tanh(h @ p["c"]) @ p["out"])
    return lax.scan(step, jnp.zeros((4, N)), x.reshape(-1, 4, M))[1].reshape(ROWS, 3)


def rematerialized(p, x):
    return jax.checkpoint(mlp)(p, x)


def jitted(p, x):
    return jax.jit(mlp)(p, x)


def by_example(p, x):
    return jax.vmap(lambda x: mlp(p, x), axis_size=4)(x.reshape(4, -1, M)).reshape(ROWS, 3)


def ensemble(p, x):
    return jax.vmap(lambda w: jnp.tanh(x @ p["a"]) @ w)(p["stack"]).mean(axis=0) @ p["out"]


FUNCTIONS = [mlp, stacked, recurrent, rematerialized, jitted, by_example, ensemble]


def masked_loss(f, mask):
    return lambda p, x: (jnp.sin(f(p, x)) * mask[:, None]).sum()


@functools.cache
def compiled(function, **options):
    """Return values and gradients of a sparse function and of the plain one, for any mask, compiled once."""
    return [
        jax.jit(lambda mask, p, x, f=f: jax.value_and_grad(masked_loss(f, mask), argnums=(0, 1))(p, x))
        for f in (msbp.sparse_vjp(function, SKIP, **options), function)
    ]


@masks
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions(function, mask):
    sparse, plain = compiled(function)
    assert_trees_close(sparse(mask, PARAMS, X), plain(mask, PARAMS, X))


@pytest.mark.parametrize("function", [mlp, stacked, rematerialized, jitted], ids=lambda f: f.__name__)
def test_bit_for_bit_where_no_row_is_0(function):
    f, p = msbp.sparse_vjp(function, SKIP), PARAMS
    loss = lambda f: jax.jit(jax.grad(lambda p, x: jnp.sin(f(p, x)).sum(), argnums=(0, 1)))
    assert_trees_equal(loss(f)(p, X), loss(function)(p, X))


@masks
def test_under_vmap_members_have_rows_of_their_own(mask):
    members = jnp.stack([mask, jnp.roll(mask, 1), jnp.ones(ROWS)])
    grads = lambda f: jax.vmap(f, in_axes=(0, None, None))(members, PARAMS, X)
    assert_trees_close(*map(grads, compiled(mlp)))


@pytest.mark.parametrize(
    "backend", [None, "xla", "dense", *(["native"] if "native" in msbp.backends()["select"] else [])]
)
@masks
def test_every_backend(backend, mask):
    sparse, plain = compiled(mlp, backend=backend)
    assert_trees_close(sparse(mask, PARAMS, X), plain(mask, PARAMS, X))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    p, x = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, X))
    mask = MASKS["half of them are"].astype(dtype)
    got, want = (jax.jit(jax.grad(masked_loss(f, mask)))(p, x) for f in (msbp.sparse_vjp(mlp, SKIP), mlp))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert_trees_close(got, want, rtol=4e-2)


class Net(nn.Module):
    """Layers that treat rows one by one."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(N)(x)))
        return nn.Dense(3)(nn.relu(nn.Dense(N)(x)))


@masks
def test_linen(mask):
    model = msbp.sparse_vjp(Net(), SKIP)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    grad = lambda m: jax.jit(jax.grad(lambda v: (m.apply(v, X) ** 2 * mask[:, None]).sum()))(variables)
    assert_trees_close(grad(model), grad(Net()))


@masks
def test_nnx(mask):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.norm = nnx.Linear(M, N, rngs=rngs), nnx.LayerNorm(N, rngs=rngs)
            self.b = nnx.Linear(N, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(self.norm(nnx.relu(self.a(x))))

    plain = Model(nnx.Rngs(0))
    sparse = msbp.sparse_vjp(Model(nnx.Rngs(0)), SKIP)
    grad = lambda m: nnx.grad(lambda m: (m(X) ** 2 * mask[:, None]).sum())(m)
    got, want = (jax.tree.leaves(nnx.to_pure_dict(grad(m))) for m in (sparse, plain))
    assert len(got) == len(want) == 6
    assert_trees_close(got, want)


def test_padding_within_examples():
    """Labels that are masked, token by token, as in a batch of sequences."""
    p, x = PARAMS, X.reshape(4, 6, M)
    mask = (jnp.arange(6)[None, :] < jnp.array([6, 2, 1, 0])[:, None]).astype(jnp.float32)
    loss = lambda f: lambda p: (jnp.square(f(p, x)) * mask[..., None]).sum() / mask.sum()
    f = lambda p, x: mlp(p | {"b": p["b"][None]}, x)
    assert_trees_close(jax.grad(loss(msbp.sparse_vjp(f, SKIP)))(p), jax.grad(loss(f))(p))


def test_a_row_that_is_not_a_number_is_not_lost():
    f = msbp.sparse_vjp(lambda w, x: x @ w, SKIP)
    scale = jnp.zeros(ROWS).at[3].set(jnp.nan)
    assert np.isnan(jax.grad(lambda w: (f(w, X) * scale[:, None]).sum())(PARAMS["a"])).all()


def test_inputs_that_are_not_finite_stay_out_with_their_row():
    """Plain JAX makes NaN of 0 times infinity; few rows are left, so that it is not plain JAX that runs."""
    x = X.at[3].set(jnp.inf)
    scale = (jnp.arange(ROWS) < 2).astype(jnp.float32)
    grad = lambda f: jax.grad(lambda w: (f(w, x) * scale[:, None]).sum())(PARAMS["a"])
    plain = lambda w, x: x @ w
    assert np.isnan(grad(plain)).all()
    assert_trees_close(grad(msbp.sparse_vjp(plain, SKIP)), jax.grad(lambda w: plain(w, X[:2]).sum())(PARAMS["a"]))


def test_there_is_nothing_to_remember():
    f, p = msbp.sparse_vjp(mlp, SKIP), PARAMS
    assert jax.tree.leaves(f.init_memory(p, X)) == []
    loss = lambda p, m: masked_loss(lambda p, x: f(p, x, memory=m), MASKS["half of them are"])(p, X)
    _, grads, _ = msbp.value_and_grad(loss)(p, f.init_memory(p, X))
    assert_trees_close(grads, jax.grad(masked_loss(mlp, MASKS["half of them are"]))(p, X))


def test_the_report_says_which_rows_and_up_to_which_share():
    report = msbp.sparse_vjp(mlp, SKIP).report(PARAMS, X)
    assert [row.name for row in report.sparse] == ["a", "c", "out"]  # however narrow
    assert {(row.keeps, row.skips, row.saved) for row in report.sparse} == {("rows that are not 0", "rows", 0.0)}
    assert all("of the rows" in row.backend for row in report.sparse)
    assert report.entering == ""
    assert "by rows" in str(report)
    assert "and the share of the rows that are left out" in " ".join(str(report).split())


def test_the_report_names_the_backend_that_is_asked_for():
    report = msbp.sparse_vjp(mlp, SKIP, backend="xla").report(PARAMS, X)
    assert {row.backend for row in report.sparse} == {"xla"}
