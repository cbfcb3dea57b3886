"""`report(measure=True)`: what is run, which variants, and what is said of the times."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from twins import assert_trees_close

import msbp_jax as msbp
from msbp_jax.sparsifiers._regroup import group_of, regrouped
from msbp_jax.transform import _measure
from msbp_jax.transform._measure import Measured
from msbp_jax.transform._report_words import measured_words
from msbp_jax.transform._step import cotangents_of, make_step

COLUMNS = msbp.memorized(msbp.top_k(density=0.1, rows_per_group=8), decay=0.8)
X = jax.random.normal(jax.random.key(0), (16, 64))
PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (64, 128)) / 8,
    "b": jax.random.normal(jax.random.key(2), (128, 64)) / 8,
    "count": jnp.arange(3),
}


def network(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"], {"of": x.shape, "sum": params["count"].sum()}


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(_measure, "MOST", 3)


def test_the_plan_and_its_variants_are_timed():
    f = msbp.sparse_vjp(network, COLUMNS)
    report = f.report(PARAMS, X, measure=True, optimizer=optax.sgd(0.1, momentum=0.9))
    measured = report.measured
    assert [group for group, _ in measured.groups] == [1, 32, None]  # 8 is the plan's
    assert {name for name, _ in measured.left_dense} == {"a", "b"}
    assert measured.rounds == 3
    assert measured.not_tried == ()
    assert 0 < measured.plain < 10
    assert measured.speed_up == pytest.approx(measured.plain / measured.sparse)
    assert " Measured on " in " ".join(str(report).split())
    assert json.loads(json.dumps(report.to_dict()))["measured"]["groups"][2][0] is None
    assert "Measured on" in report._repr_html_()


def test_rows_have_no_groups_to_try(monkeypatch):
    tried = []
    measure = lambda calls, twice: (tried.extend(calls), (dict.fromkeys(calls, 1.0), 1))[1]
    monkeypatch.setattr(_measure, "_medians", measure)
    f = msbp.sparse_vjp(network, msbp.sample_rows(efficiency=0.9))
    f.report(PARAMS, X, measure=True, share=0.25)
    assert tried[:2] == ["plain", "sparse"]
    assert set(tried[2:]) == {"a dense", "b dense"}
    one = msbp.sparse_vjp(network, {"a": msbp.top_k(k=8)}).report(PARAMS, X, measure=True)
    assert one.measured.left_dense == ()  # without the only one it is the plain step
    assert "Train this dense" in str(one)


def test_what_there_is_no_time_for_is_said(monkeypatch):
    monkeypatch.setattr(_measure, "BUDGET", 0.0)
    report = msbp.sparse_vjp(network, COLUMNS).report(PARAMS, X, measure=True)
    assert report.measured.groups == report.measured.left_dense == ()
    text = " ".join(str(report).split())
    assert "Not tried, for want of time: rows_per_group=1, rows_per_group=32, rows_per_group=None, " in text


def test_shapes_cannot_be_timed():
    f = msbp.sparse_vjp(network, COLUMNS)
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    said = r"report\(measure=True\) runs training steps, and needs arrays in all arguments, got shapes or tracers"
    with pytest.raises(ValueError, match=said):
        f.report(*shapes, measure=True)
    with pytest.raises(ValueError, match=said):
        jax.jit(lambda p, x: f.report(p, x, measure=True))(PARAMS, X)
    with pytest.raises(ValueError, match=said):
        jax.jit(lambda: f.report(PARAMS, X, measure=True))()  # closed over


def test_a_step_computes_what_training_does():
    f = msbp.sparse_vjp(network, COLUMNS)
    program = f._program(PARAMS, (X,), {})
    cotangents = cotangents_of(program, None)
    memory = f.init_memory(PARAMS, X)
    floats = {name: PARAMS[name] for name in ("a", "b")}
    (g,) = cotangents.values()
    plain, sparse = (make_step(program, PARAMS, cotangents, None, plain=yes) for yes in (True, False))

    def loss(p, memory=None):
        call = network if memory is None else lambda p, x: f(p, x, memory=memory)
        return jnp.sum(call({**p, "count": PARAMS["count"]}, X)[0] * g)

    outputs, others, grads, _, _ = jax.jit(plain.run)(*plain.arguments)
    assert_trees_close(grads, {**jax.grad(loss)(floats), "count": None})
    assert_trees_close(outputs, [network(PARAMS, X)[0]])
    assert [int(other) for other in others] == [3]
    _, _, grads, renewed, _ = jax.jit(sparse.run)(*sparse.arguments)
    _, wanted, new_memory = msbp.value_and_grad(loss)(floats, memory)
    assert_trees_close(grads, {**wanted, "count": None})
    assert_trees_close(renewed["a"]["residual"]["total"], new_memory["a"].residual)
    tx = optax.sgd(0.5)
    step = make_step(program, PARAMS, cotangents, tx, plain=False)
    assert_trees_close(jax.jit(step.run)(*step.arguments)[2]["a"], optax.apply_updates(floats["a"], -0.5 * wanted["a"]))


def test_an_optimizer_that_asks_for_the_loss_gets_it_and_another_is_named():
    program = msbp.sparse_vjp(network, COLUMNS)._program(PARAMS, (X,), {})
    cotangents = cotangents_of(program, None)
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    step = make_step(program, PARAMS, cotangents, plateau, plain=True)
    with jax.numpy_dtype_promotion("standard"):  # as Optax needs it there
        jax.eval_shape(step.run, *step.arguments)
    asks = lambda grads, state, params=None, *, curvature, **rest: (grads, state)
    step = make_step(program, PARAMS, cotangents, optax.GradientTransformationExtraArgs(lambda p: (), asks), plain=True)
    with pytest.raises(TypeError, match=r"calls optimizer.update\(grads, state, params, value=loss\), and this"):
        jax.eval_shape(step.run, *step.arguments)


def test_a_share_of_the_rows_of_the_gradient_is_not_0():
    program = msbp.sparse_vjp(network, COLUMNS)._program(PARAMS, (X,), {})
    (g,) = cotangents_of(program, 0.25).values()
    assert int(jnp.any(g != 0, axis=1).sum()) == 4
    (whole,) = cotangents_of(program, None).values()
    assert bool(jnp.all(whole != 0))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(64)(x))
        return nn.Dense(64)(nn.Dropout(0.1, deterministic=False)(x))


def test_batch_statistics_dropout_nnx_and_sparse_weights_are_run(monkeypatch):
    monkeypatch.setattr(_measure, "_variants", lambda program, dearest: {})
    model = msbp.sparse_vjp(Normed(), COLUMNS)
    variables = Normed().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    tx = optax.sgd(0.1, momentum=0.9)
    assert model.report(variables, X, measure=True, optimizer=tx, **options).measured.sparse > 0
    module = msbp.sparse_vjp(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), COLUMNS)
    assert module.report(X, measure=True, optimizer=tx).measured.sparse > 0
    pruned = msbp.prune({"params": nn.Dense(64).init(jax.random.key(0), X)["params"]}, density=0.1)
    sparse = msbp.sparse_weights(nn.Dense(64))
    report = sparse.report(pruned, X, measure=True, optimizer=tx)
    assert report.measured.plain > 0
    assert report.expected is None


def words(**changed):
    base = {"plain": 10e-3, "sparse": 8e-3, "groups": (), "left_dense": (), "not_tried": (), "rounds": 9}
    return " ".join(measured_words(Measured(**{**base, "device": "cpu", **changed})))


def test_what_is_said_of_the_times():
    assert words() == "Measured on cpu, medians of 9: a step 1.25 times faster (8 ms instead of 10)."
    assert "Train this dense: nothing that was tried is faster than the dense step, beyond noise." in words(plain=7e-3)
    groups = ((1, 9e-3), (32, 5e-3), (None, 6e-3))
    said = "rows_per_group=32 is best: 5 ms, 2 times faster than dense (1: 9, None: 6)."
    assert said in words(groups=groups)
    assert "Train" not in words(plain=7e-3, groups=groups)
    assert "rows_per_group" not in words(groups=((32, 7.9e-3),))  # noise
    assert "Leave dense: b (6 ms with it dense), a (7 ms with it dense)." in words(
        left_dense=(("a", 7e-3), ("b", 6e-3), ("c", 7.9e-3))
    )
    assert "Leave dense" not in words(plain=5e-3, left_dense=(("a", 7e-3),))
    within_noise = words(plain=10e-3, sparse=10.2e-3, groups=((8, 9.99e-3),))
    assert "Train this dense" in within_noise
    left = {"plain": 10e-3, "sparse": 20e-3, "left_dense": (("a", 9e-3),)}
    slower = words(**left, groups=((8, 15e-3),))
    assert "rows_per_group=8 is better than as planned: 15 ms, 0.67 times as fast as dense." in slower
    assert "Leave dense: a" in slower
    waiting = words(plain=7e-3, at="while nothing is left out", left_dense=(("a", 7.1e-3),))
    assert waiting.startswith("Measured while nothing is left out on cpu, ")
    assert "rain this dense" not in waiting
    assert "Leave dense" not in waiting


def test_only_sparsifiers_that_choose_columns_have_groups():
    top_k = msbp.top_k(density=0.1, rows_per_group=4)
    assert group_of(top_k) == (4,)
    assert regrouped(top_k, None) == msbp.top_k(density=0.1, rows_per_group=None)
    assert regrouped(COLUMNS, 32) == msbp.memorized(msbp.top_k(density=0.1, rows_per_group=32), decay=0.8)
    local = msbp.memorized(top_k, decay=0.8, reduce="local", shards=2)
    assert regrouped(local, 8).name == local.name.replace("rows_per_group=4", "rows_per_group=8")
    both = msbp.split(dx=msbp.dense(), dw=top_k)
    assert regrouped(both, 1) == msbp.split(dx=msbp.dense(), dw=msbp.top_k(density=0.1))
    assert group_of(msbp.random_k(k=3, rows_per_group=None)) == (None,)
    own = msbp.Sparsifier(init=lambda aval: (), apply=lambda u, state: (u, state))
    for other in (msbp.sample_rows(density=0.5), msbp.dithered(4), msbp.skip_zero_rows(), msbp.dense(), own):
        assert regrouped(other, 8) is None
        assert group_of(other) is None


def test_numpy_arguments_are_arrays():
    f = msbp.sparse_vjp(lambda w, x: x @ w, {"params": msbp.top_k(k=8)})
    assert f.report(np.ones((64, 128), np.float32), np.ones((16, 64), np.float32), measure=True).measured.plain > 0
