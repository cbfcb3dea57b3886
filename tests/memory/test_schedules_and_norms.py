"""A decay that is a schedule, whose step lives in the state; and sparsifiers that see norms of the operands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

W = jax.random.normal(jax.random.key(0), (8, 64)) / 3
X = jax.random.normal(jax.random.key(1), (12, 8))
TOP = msbp.top_k(k=6)


def product(w, x):
    return jnp.tanh(x @ w)


def step_of(f):
    return jax.jit(msbp.value_and_grad(lambda w, m, x: (f(w, x, memory=m) ** 2).mean()))


@pytest.mark.parametrize("reduce", ["mean", "slot", "local"])
@pytest.mark.parametrize("inner", [TOP, msbp.top_k(k=6, rows_per_group=3)], ids=str)
def test_a_schedule_is_the_decay_of_each_step(inner, reduce):
    options = {"reduce": reduce} | ({"shards": 2} if reduce == "local" else {})
    schedule = optax.linear_schedule(0.9, 0.1, transition_steps=2)
    f = msbp.sparse_vjp(product, msbp.memorized(inner, schedule, **options))
    memory = f.init_memory(W, X)
    step = step_of(f)
    for number in range(4):  # a program for each decay
        g = msbp.sparse_vjp(product, msbp.memorized(inner, float(schedule(number)), **options))
        state = memory["params"]
        constant = {"params": state._replace(inner=state.inner.inner)}
        _, want, after = step_of(g)(W, constant, X)
        _, grads, memory = step(W, memory, X)
        assert_trees_close(grads, want)
        assert_trees_close(memory["params"].residual, after["params"].residual)
        assert (memory["params"].inner.step == number + 1).all()
    assert step._cache_size() == 1
    assert "decay=schedule" in repr(msbp.memorized(inner, schedule, **options))


def test_a_schedule_counts_steps_and_not_uses():
    """Time steps, members of a vmap and microbatches of one step are one step; padding is none."""
    f = msbp.sparse_vjp(lambda w, xs: lax.map(lambda x: jnp.tanh(x @ w), xs), msbp.memorized(TOP, lambda step: 0.5))
    xs = X.reshape(3, 4, 8)
    memory = f.init_memory(W, xs)
    _, _, memory = step_of(f)(W, memory, xs)
    assert memory["params"].inner.step == 1
    zero = jax.jit(msbp.value_and_grad(lambda w, m, x: (0.0 * f(w, x, memory=m)).mean()))
    assert zero(W, memory, xs)[2]["params"].inner.step == 1


def test_a_constant_schedule_is_the_constant():
    constant, scheduled = (msbp.sparse_vjp(product, msbp.memorized(TOP, d)) for d in (0.8, lambda step: 0.8))
    results = []
    for f in (constant, scheduled):
        memory, step = f.init_memory(W, X), step_of(f)
        for _ in range(3):
            loss, grads, memory = step(W, memory, X)
        results.append((loss, grads, memory["params"].residual))
    assert_trees_equal(*results)


def test_bad_decays():
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\] \(share of the residual .* or a schedule\)"):
            msbp.memorized(TOP, bad)
    with pytest.raises(TypeError, match=r"decay must be a number in .* got 'fast'"):
        msbp.memorized(TOP, "fast")


def seeing(*wants):
    """Return a sparsifier that propagates the norms that it sees, so that tests can read them off the gradient."""

    def apply(u, state, **seen):
        assert set(seen) == set(wants)
        rows = seen.get("input_norms", jnp.ones(u.shape[0]))[:, None]
        columns = seen.get("weight_norms", jnp.ones(u.shape[1]))[None, :]
        return msbp.Dense((rows * columns).astype(u.dtype) * jnp.ones_like(u)), state

    return msbp.Sparsifier(init=lambda aval: (), apply=apply, name="seeing", wants=wants)


def conv(groups=1, dims=("NHWC", "HWIO", "NHWC")):
    options = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": dims, "feature_group_count": groups}
    return lambda w, x: lax.conv_general_dilated(x, w, **options)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# A contraction; its operands; and the norms of what each output is made from, and of each feature's weights.
SEEN = {
    "product": (lambda w, x: x @ w, W, X, lambda w, x: (norm(x, 1), norm(w, 0))),
    "weight first": (lambda w, x: w.T @ x.T, W, X, lambda w, x: (norm(x, 1), norm(w, 0))),
    "experts": (
        lambda w, x: jnp.einsum("ebm,emn->ebn", x, w),
        normal(3, 8, 64),
        normal(3, 4, 8, seed=1),
        lambda w, x: (norm(x, 2), norm(w, 1)),
    ),
    "convolution": (
        conv(),
        normal(2, 2, 3, 64),
        normal(2, 4, 4, 3, seed=1),
        lambda w, x: (norm(windows(x), 1), norm(w.reshape(-1, 64), 0)),
    ),
    "grouped": (
        conv(groups=2),
        normal(1, 1, 2, 64),
        normal(2, 3, 3, 4, seed=1),
        lambda w, x: (norm(x.reshape(18, 4)[:, :2], 1), norm(w.reshape(-1, 64), 0)),
    ),
    "ragged": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([5, 0, 7], jnp.int32)),
        normal(3, 8, 64),
        X,
        lambda w, x: (norm(x, 1), norm(w.reshape(24, 64), 0)),
    ),
}


def norm(a, axis):
    return np.sqrt((np.asarray(a, np.float64) ** 2).sum(axis))


def windows(x):
    parts = [x[:, i : i + 3, j : j + 3] for i in range(2) for j in range(2)]
    return np.concatenate(parts, axis=-1).reshape(-1, 12)


@pytest.mark.parametrize("wants", [("input_norms",), ("weight_norms",), ("input_norms", "weight_norms")])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: msbp.memorized(s, 0.5)], ids=["plain", "memorized"])
@pytest.mark.parametrize("case", SEEN)
def test_norms_are_those_of_the_operands(case, wrap, wants):
    function, w, x, expected = SEEN[case]
    f = msbp.sparse_vjp(function, wrap(seeing(*wants)))
    _, grads, _ = msbp.value_and_grad(lambda w, m: f(w, x, memory=m).sum())(w, f.init_memory(w, x))
    rows, columns = expected(w, x)
    rows = rows if "input_norms" in wants else np.ones_like(rows)
    columns = columns if "weight_norms" in wants else np.ones_like(columns)
    p = rows[..., :, None] * columns[..., None, :]
    y, pull_back = jax.vjp(lambda w: function(w, x), w)
    if case == "weight first":
        p = p.T
    want = pull_back(jnp.asarray(p.reshape(y.shape), y.dtype))[0]
    assert_trees_close(grads, want, rtol=1e-4)


def test_only_known_norms_can_be_wanted():
    f = msbp.sparse_vjp(product, seeing("loss"))
    with pytest.raises(ValueError, match=r"A sparsifier may want input_norms and weight_norms, got 'loss'"):
        f.init_memory(W, X)


def test_a_diagnosis_takes_the_step_of_a_schedule_for_no_memory():
    f = msbp.sparse_vjp(product, msbp.memorized(TOP, lambda step: 0.5))
    loss = lambda w, m, x: (f(w, x, memory=m) ** 2).mean()
    memory = f.init_memory(W, X)
    for _ in range(3):
        _, _, after = msbp.value_and_grad(loss)(W, memory, X)
        norm = msbp.diagnose(loss)(W, memory, X).sites["params"].memory_norm
        np.testing.assert_allclose(norm, msbp.metrics(after)["params/memory_norm"], rtol=1e-5)
        memory = after
