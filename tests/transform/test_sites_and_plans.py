"""Which contraction gets which sparsifier, what stays dense and why, and what the report says of it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from twins import assert_trees_close, assert_trees_equal, masked

import msbp_jax as msbp

S = msbp.top_k(k=4)
X = jnp.ones((6, 8))
PARAMS = {"body": {"w": jnp.ones((8, 64)), "v": jnp.ones((64, 72))}, "head": {"w": jnp.ones((72, 10))}}


def f(params, x):
    return x @ params["body"]["w"] @ params["body"]["v"] @ params["head"]["w"]


def dense_rows(g, *args):
    return {row.name: row.reason for row in g.report(*args).dense}


def test_first_match_wins_and_unmatched_sites_stay_dense():
    plan = {"*/v": msbp.random_k(k=3), "body/*": S, "head/*": msbp.dense()}
    report = msbp.sparse_vjp(f, plan, min_features=1).report(PARAMS, X)
    assert {row.name: (row.k, row.sparsifier.split("(")[0]) for row in report.sparse} == {
        "body/w": (4, "top_k"),
        "body/v": (3, "random_k"),
    }
    assert [(row.name, row.reason) for row in report.dense] == [("head/w", "dense() keeps all 10 features")]
    rows = dense_rows(msbp.sparse_vjp(f, {"body/w": S}), PARAMS, X)
    assert rows == dict.fromkeys(["body/v", "head/w"], "no pattern of the plan matches")


def test_report_in_numbers_and_in_print():
    report = msbp.sparse_vjp(f, msbp.top_k(density=0.25, rows_per_group=4)).report(PARAMS, X)
    first, second = report.sparse
    assert (first.name, first.contraction, first.rows, first.m, first.n) == ("body/w", "6x8 . 8x64", 6, 8, 64)
    assert (first.k, first.rows_per_group, first.instances) == (16, 4, 1)
    assert first.backend in msbp.backends()["grad_input"]
    assert (second.k, second.saved) == (18, 0.75)
    work = {"w": 8 * 64, "v": 64 * 72, "head": 72 * 10}
    assert report.saved == pytest.approx(0.75 * (work["w"] + work["v"]) / sum(work.values()))
    text = str(report)
    for part in ("body/v", "18 of 72", "75.0%", "head/w", "10 features, fewer than min_features=64", first.backend):
        assert part in text


def test_min_features():
    assert set(msbp.sparse_vjp(f, S).init_memory(PARAMS, X)) == {"body/w", "body/v"}
    assert set(msbp.sparse_vjp(f, S, min_features=10).init_memory(PARAMS, X)) == {"body/w", "body/v", "head/w"}
    assert set(msbp.sparse_vjp(f, S, min_features=65).init_memory(PARAMS, X)) == {"body/v"}


def test_a_tied_weight_has_a_memory_for_each_use():
    g = msbp.sparse_vjp(lambda w, x: (x @ w) @ w.T, msbp.memorized(S, decay=0.5))
    memory = g.init_memory(jnp.ones((64, 80)), jnp.ones((6, 64)))
    assert {name: state.residual.shape for name, state in memory.items()} == {"params": (80,), "params#2": (64,)}
    tied, args = lambda p, x: (x @ p["w"]) @ p["w"].T, ({"w": jnp.ones((64, 80))}, jnp.ones((6, 64)))
    assert set(msbp.sparse_vjp(tied, {"w#2": msbp.dense(), "w": S}).init_memory(*args)) == {"w"}
    with pytest.raises(ValueError, match=r"'w#2' of the plan can never apply: .* 'w' stands before it and matches w#2"):
        msbp.sparse_vjp(tied, {"w": S, "w#2": msbp.dense()}).init_memory(*args)
    only_second = msbp.sparse_vjp(lambda p, x: (x @ p["w"]) @ p["w"].T, {"w#2": S})
    assert set(only_second.init_memory({"w": jnp.ones((64, 80))}, jnp.ones((6, 64)))) == {"w#2"}


def test_a_weight_of_several_leaves_is_named_after_the_largest():
    params = {"w": jnp.ones((8, 64)), "a": jnp.ones((8, 2)), "b": jnp.ones((2, 64))}
    g = msbp.sparse_vjp(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), S)
    assert set(g.init_memory(params, X)) == {"w"}
    (reason,) = dense_rows(g, params, X).values()
    assert reason == "both operands are made from parameters alone (what a function closes over is no data: pass it)"


def test_a_contraction_of_data_is_dense_unless_named():
    def attend(w, x):
        q = x @ w
        return jax.nn.softmax(q @ q.T) @ q

    plain = msbp.sparse_vjp(attend, {"*": S}, min_features=1)
    w, x = (jax.random.normal(jax.random.key(i), shape) / 3 for i, shape in enumerate([(8, 64), (10, 8)]))
    assert set(dense_rows(plain, w, x)) == {"@dot_general_0", "@dot_general_1"}
    named = msbp.sparse_vjp(attend, {"@dot_general_1": S, "*": S}, min_features=1)
    assert set(named.init_memory(w, x)) == {"params", "@dot_general_1"}
    grads = []
    for g in (plain, named):
        loss = lambda w, m, g=g: (g(w, x, memory=m) ** 2).mean()
        grads.append(msbp.value_and_grad(loss)(w, g.init_memory(w, x))[1])
    assert jnp.isfinite(grads[1]).all()
    assert not jnp.allclose(*grads)


@pytest.mark.parametrize("kind", ["while", "custom_vjp_call", "custom_jvp_call"])
def test_bodies_with_a_derivative_of_their_own_are_left_alone_and_named(kind):
    def product(a, w):
        return a @ w

    own = {"custom_vjp_call": jax.custom_vjp(product), "custom_jvp_call": jax.custom_jvp(product)}
    if kind == "custom_vjp_call":
        own[kind].defvjp(lambda a, w: (a @ w, (a, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    elif kind == "custom_jvp_call":
        own[kind].defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))

    def g(params, x):
        h = x @ params["in"]
        if kind == "while":
            h = lax.while_loop(
                lambda c: c[0] < x.shape[0] * h.sum(), lambda c: (c[0] + 1, c[1] @ params["w"]), (0.0, h)
            )[1]
            h = lax.stop_gradient(h)
        else:
            h = own[kind](h, params["w"])
        return h @ params["out"]

    params = {"in": jnp.ones((8, 64)), "w": jnp.ones((64, 64)) / 64, "out": jnp.ones((64, 64))}
    wrapped = msbp.sparse_vjp(g, S)
    reasons = dense_rows(wrapped, params, X)
    assert "w" in reasons
    assert kind in reasons["w"]
    assert "keeps its own derivative" in reasons["w"]
    assert set(wrapped.init_memory(params, X)) == {"in", "out"}
    if kind != "while":
        loss = lambda p, m: (wrapped(p, X, memory=m) ** 2).mean()
        grads = msbp.value_and_grad(loss)(params, wrapped.init_memory(params, X))[1]
        assert jnp.abs(grads["w"]).sum() > 0


def test_batched_weights_have_a_memory_for_each_batch_element():
    params, x = jnp.ones((3, 8, 64)), jax.random.normal(jax.random.key(0), (3, 5, 8))
    g = msbp.sparse_vjp(lambda w, x: jnp.einsum("ebi,eio->beo", x, w), msbp.memorized(S, decay=0.5))
    memory = g.init_memory(params, x)
    assert memory["params"].residual.shape == (3, 64)
    loss = lambda w, m: (g(w, x, memory=m) ** 2).mean()
    grads, after = msbp.value_and_grad(loss)(params, memory)[1:]
    one = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(S, decay=0.5))
    for e in range(3):
        single = lambda w, m, e=e: (one(w, x[e], memory=m) ** 2).sum() / (5 * 3 * 64)
        want, m = msbp.value_and_grad(single)(params[e], one.init_memory(params[e], x[e]))[1:]
        assert jnp.allclose(grads[e], want, rtol=1e-5)
        assert jnp.allclose(after["params"].residual[e], m["params"].residual, rtol=1e-5, atol=1e-9)


def test_keys_differ_between_sites_and_instances():
    params = {"a": jnp.ones((8, 64)), "s": jnp.ones((3, 64, 64))}
    g = msbp.sparse_vjp(
        lambda p, x: lax.scan(lambda h, w: (h @ w, None), x @ p["a"], p["s"])[0], msbp.random_k(k=4, rescale=True)
    )
    memory = g.init_memory(params, X)
    keys = [jax.random.key_data(memory["a"].key), *jax.random.key_data(memory["s"].key)]
    assert len({tuple(map(int, key)) for key in keys}) == 4
    loss = lambda p, m: g(p, X, memory=m).mean()
    after = msbp.value_and_grad(loss)(params, memory)[2]
    new = [jax.random.key_data(after["a"].key), *jax.random.key_data(after["s"].key)]
    assert len({tuple(map(int, key)) for key in keys + new}) == 8


def test_arguments_that_are_no_arrays_are_passed_as_they_are():
    def g(w, x, *, power, names):
        assert power == 2
        assert names == ["a"]
        return {"y": (x @ w) ** power, "name": names[0]}

    wrapped = msbp.sparse_vjp(g, S)
    w = jnp.ones((8, 64))
    out = wrapped(w, X, memory=wrapped.init_memory(w, X, power=2, names=["a"]), power=2, names=["a"])
    assert out["name"] == "a"
    assert wrapped.__name__ == "g"
    assert "top_k(k=4" in repr(wrapped)


def test_a_conv_of_few_features_is_evaluated_unchanged():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"c": jax.random.normal(keys[0], (3, 3, 1, 4)), "w": jax.random.normal(keys[1], (4 * 64, 64))}
    x = jax.random.normal(keys[2], (2, 8, 8, 1))

    def g(p, x, mark=lambda y: y):
        y = lax.conv_general_dilated(x, p["c"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return mark(y.reshape(x.shape[0], -1) @ p["w"])

    wrapped = msbp.sparse_vjp(g, S)
    memory = wrapped.init_memory(params, x)
    assert set(memory) == {"w"}
    assert_trees_equal(wrapped(params, x, memory=memory), g(params, x))
    grads = msbp.value_and_grad(lambda p, m: (wrapped(p, x, memory=m) ** 2).mean())(params, memory)[1]
    twin = jax.grad(lambda p: (g(p, x, lambda y: masked(y, 4, 1)) ** 2).mean())(params)
    assert_trees_close(grads, twin)


def test_the_report_warns_where_sparse_is_slower():
    report = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=1000)).report(
        jnp.ones((1024, 1024)), jnp.ones((1024, 1024))
    )
    (row,) = report.sparse
    assert row.backend == "dense"
    assert "probably slower than the dense one" in row.warning
    assert "its products run dense, on the sparse gradient" in row.warning
    assert f"params: {row.warning}" in " ".join(str(report).split())  # it is broken into lines there


def test_a_backend_that_is_dense_is_one_of_the_kernels():
    params = {"w": jnp.ones((8, 64)), "c": jnp.ones((3, 8, 64))}
    conv = lambda x, w: lax.conv_general_dilated(x[None], w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    f = msbp.sparse_vjp(lambda p, x: x @ p["w"] + conv(x, p["c"])[0], msbp.top_k(k=4), backend="dense")
    rows = {row.name: row for row in f.report(params, X).sparse}
    assert rows["w"].backend == "dense"
    assert "grouped" not in rows["w"].warning
    assert rows["c"].backend == "xla, dense"
    assert rows["c"].warning.endswith('backend="dense" asks for it.')
