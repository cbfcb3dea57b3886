"""What a report says first, at which density, in which form, and what it refuses."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import msbp_jax as msbp
from msbp_jax.transform._estimate import LayerEstimate, StepEstimate
from msbp_jax.transform._report_words import gain, ms

COLUMNS = msbp.memorized(msbp.top_k(density=0.1, rows_per_group=16), decay=0.8)
ROWS = msbp.sample_rows(efficiency=0.9)
X = jax.random.normal(jax.random.key(0), (32, 64))
PARAMS = {"a": jnp.ones((64, 128)) / 64, "b": jnp.ones((128, 10)) / 128}


def network(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def report_with(layers, sparsifier=COLUMNS, **changed):
    """Return a report whose step is expected to take these milliseconds: a layer's backward, dense and sparse."""
    report = msbp.sparse_vjp(network, sparsifier).report(PARAMS, X)
    estimates = tuple(LayerEstimate(name=n, dense=d / 1e3, sparse=s / 1e3) for n, (d, s) in layers.items())
    expected = StepEstimate(forward=5e-3, rest=2e-3, optimizer=1e-3, layers=estimates)
    return dataclasses.replace(report, **{"expected": expected, **changed})


def words(report):
    return " ".join(str(report).split())


def trained(f, params, x):
    memory = f.init_memory(params, x)
    for _ in range(2):
        memory = msbp.value_and_grad(lambda p, m: (f(p, x, memory=m)[:8] ** 2).sum())(params, memory)[2]
    return memory


def test_the_headline_is_the_speed_up_of_the_step():
    report = report_with({"a": (12.0, 3.0), "b": (2.0, 2.0)})
    assert words(report).startswith(
        "Expected: a step 1.69 times faster (13 ms instead of 22; forward 5, backward of the layers 5 instead of 14, "
        "the rest 2, optimizer 1). Sparse backward: "
    )
    assert re.search(r"^a +4\.00x +3 +12 +\d", str(report), re.M)
    assert re.search(r"^b +2\n    32x128 . 128x10; 10 features, fewer", str(report), re.M)
    assert report.layers["a"].speed_up == pytest.approx(4)


def test_on_the_other_side_of_1_it_says_so():
    text = words(report_with({"a": (2.0, 3.0), "b": (2.0, 2.0)}))
    assert text.startswith("Expected: a step 0.92 times as fast (13 ms instead of 12;")
    assert "optimizer 1): train this dense." in text
    assert re.search(r" a 0\.67x 3 2 ", text)
    assert words(report_with({"a": (2.0, 2.0)})).startswith("Expected: a step as fast as the dense one (10 ms")


def test_without_an_optimizer_none_is_counted():
    f = msbp.sparse_vjp(network, COLUMNS)
    assert "No optimizer is counted: optimizer= does." in words(f.report(PARAMS, X))
    report = f.report(PARAMS, X, optimizer=optax.adam(1e-3))
    assert "No optimizer" not in words(report)
    assert report.expected.optimizer > 0


def test_a_density_that_only_the_run_tells_is_given_or_read_or_nothing_is_left_out():
    f = msbp.sparse_vjp(network, ROWS)
    whole = f.report(PARAMS, X)
    assert words(whole).startswith("Expected while nothing is left out: ")
    assert "train this dense" not in words(whole)
    assert "At a density, it is told by share= or memory=." in words(whole)
    quarter = f.report(PARAMS, X, share=0.25)
    assert quarter.density == "with a share of 0.25 kept"
    assert dict(quarter.shares) == {"a": 0.25, "b": 0.25}
    memory = trained(f, PARAMS, X)
    read = f.report(PARAMS, X, memory=memory)
    density = float(msbp.metrics(memory)["@outputs/density"])
    assert 0 < density <= 8 / 32
    assert dict(read.shares) == pytest.approx({"a": density, "b": density})
    assert read.density == f"at the density of the memory, {density:.2g}"
    assert f.report(PARAMS, X, memory=f.init_memory(PARAMS, X)).density == whole.density  # no step was seen
    assert f.report(PARAMS, X, memory=jax.eval_shape(lambda: f.init_memory(PARAMS, X))).density == whole.density
    assert f.report(f.with_memory(PARAMS, X), X).density == whole.density
    wide = {"a": jnp.ones((1024, 1024)), "b": jnp.ones((1024, 1024))}, jnp.ones((1024, 1024))
    assert f.report(*wide, share=0.25).expected.sparse < f.report(*wide, share=0.5).expected.sparse
    known = msbp.sparse_vjp(network, msbp.sample_rows(density=0.25)).report(PARAMS, X)
    assert known.density == 'with 0.25 of the rows kept, as "@outputs" says'
    assert set(dict(known.shares).values()) == {0.25}
    assert msbp.sparse_vjp(network, COLUMNS).report(PARAMS, X, share=0.5).density == ""  # shapes tell all


def test_densities_of_entries_are_those_of_each_layer():
    f = msbp.sparse_vjp(network, msbp.dithered(4))
    memory = trained(f, PARAMS, X)
    report = f.report(PARAMS, X, memory=memory)
    told = {name.split("/")[0]: float(value) for name, value in msbp.metrics(memory).items()}
    assert dict(report.shares) == pytest.approx(told)
    assert set(dict(f.report(PARAMS, X).shares).values()) == {1.0}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, share=None):
        del share
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


def test_linen_nnx_and_sparse_weights_have_the_same():
    model = msbp.sparse_vjp(Net(), ROWS)
    variables = model.init(jax.random.key(0), X)
    memory = model.init_memory(variables, X)
    assert model.report(variables, X, memory=memory, optimizer=optax.sgd(0.1)).expected.optimizer > 0
    assert "Conv" not in words(model.report(jax.eval_shape(lambda: variables), X))
    module = msbp.sparse_vjp(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), ROWS)
    assert module.report(X, share=0.5).shares == (("kernel", 0.5),)
    module.init_memory(X)
    loss = lambda module, x: (module(x)[:8] ** 2).sum()
    msbp.nnx.value_and_grad(loss)(module, X)
    assert module.report(X).density.startswith("at the density of the memory")
    assert module.report(X[:16]).expected.optimizer == 0
    pruned = msbp.prune(variables, density=0.1)
    text = words(msbp.sparse_weights(Net()).report(pruned, X, optimizer=optax.sgd(0.1)))
    assert text.startswith(
        "What a step gains is not estimated: there is no model of it with sparse weights; measure=True"
    )


def test_what_the_model_has_by_the_same_name_is_to_be_passed_by_position():
    model = msbp.sparse_vjp(Net(), ROWS)
    variables = model.init(jax.random.key(0), X)
    assert model.report(variables, X, "a").density == "while nothing is left out"
    with pytest.raises(TypeError, match=r"report takes share= for itself, and Net has an argument 'share' too.*"):
        model.report(variables, X, share=0.5)
    f = msbp.sparse_vjp(lambda p, x, optimizer=None, **rest: network(p, x), ROWS)
    with pytest.raises(TypeError, match=r"Pass the model's by position, or wrap a function"):
        f.report(PARAMS, X, optimizer=optax.sgd(0.1))
    g = msbp.sparse_vjp(lambda p, x, measure=True: network(p, x), ROWS)
    with pytest.raises(TypeError, match=r"report takes measure= for itself"):
        g.report(PARAMS, X, measure=False)
    assert f.report(PARAMS, X, share=0.5).shares


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"share": 0}, ValueError, r"share must lie in \(0, 1\]"),
        ({"share": "half"}, TypeError, r"share must be a number in \(0, 1\]"),
        ({"optimizer": 0.1}, TypeError, r"optimizer must be one of Optax, such as optax.adam\(1e-3\), got 0.1"),
        ({"measure": "yes"}, TypeError, r"measure must be True or False, got 'yes'"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        msbp.sparse_vjp(network, ROWS).report(PARAMS, X, **options)


@pytest.mark.parametrize("sparsifier", [COLUMNS, ROWS, msbp.dithered(4), msbp.top_k(k=4, rows_per_group=None)])
def test_it_is_80_columns_wide_and_goes_into_json_and_html(sparsifier):
    names = {"encoder_layers_0_attention_self/query_projection/kernel<&>": PARAMS["a"], "b": PARAMS["b"]}
    first = next(iter(names))
    f = msbp.sparse_vjp(lambda p, x: jnp.tanh(x @ p[first]) @ p["b"], sparsifier)
    report = f.report(names, X)
    assert max(map(len, str(report).splitlines())) <= 80
    assert first in str(report)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["expected"]["speed_up"] == pytest.approx(report.expected.speed_up)
    assert told["saved"] == pytest.approx(report.saved)
    assert told["sparse"][0]["name"] == first
    assert set(told) == {field.name for field in dataclasses.fields(report)}
    page = report._repr_html_()
    assert "kernel&lt;&amp;&gt;" in page
    assert "<&>" not in page
    assert page.count("<table>") == page.count("</table>") >= 1


def test_a_share_that_cannot_be_used_is_named():
    wanted = msbp.sparse_vjp(network, msbp.sample_rows(density=0.25)).report(PARAMS, X, share=0.9)
    assert set(dict(wanted.shares).values()) == {0.25}
    assert "0.25 of the rows kept" in wanted.density
    assert 'share=0.9 is of no use here: "@outputs" draws 0.25 of the rows, exactly.' in wanted.notes
    columns = msbp.sparse_vjp(network, COLUMNS).report(PARAMS, X, share=0.9)
    assert "share=0.9 is of no use here: shapes tell what is kept." in columns.notes


def test_optimizers_in_other_forms():
    f = msbp.sparse_vjp(network, COLUMNS)
    several = optax.MultiSteps(optax.adam(1e-3), 4)
    assert f.report(PARAMS, X, optimizer=several).expected.optimizer > 0
    of_nnx = nnx.Optimizer(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), optax.adam(1e-3), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"got an object of the type Optimizer. Pass its .tx."):
        f.report(PARAMS, X, optimizer=of_nnx)
    listed = msbp.sparse_vjp(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], COLUMNS)
    masked = optax.masked(optax.adam(1e-3), [True, False])
    assert listed.report([PARAMS["a"], PARAMS["b"]], X, optimizer=masked).expected.optimizer > 0


def test_small_words():
    same = report_with({"a": (12.0, 12.01), "b": (2.0, 2.0)})
    assert "train this dense" not in words(same)
    assert (ms(0.9997), gain(1234.0)) == ("1000", "a step 1234 times faster")
    both = msbp.split(dx=msbp.skip_zero_rows(), dw=msbp.dithered(4))
    text = str(msbp.sparse_vjp(network, both).report(PARAMS, X))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^a .* at run$", text, re.M)


def test_why_nothing_is_estimated_is_said():
    report = report_with({}, expected=None, unexpected="it is a test")
    assert words(report).startswith("What a step gains is not estimated: it is a test.")
    assert report.layers == {}
    assert json.dumps(report.to_dict())


def test_what_has_no_gradient_has_a_report():
    f = msbp.sparse_vjp(lambda p, x: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x + 1, x) @ p, COLUMNS)
    report = f.report(jnp.ones((64, 128)), X)
    assert [row.name for row in report.sparse] == ["params"]
    params = jnp.ones((64, 64))
    looped = msbp.sparse_vjp(lambda p, x: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ p, x @ p), COLUMNS)
    said = "What a step gains is not estimated: its gradient cannot be traced (Reverse-mode differentiation"
    assert words(looped.report(params, X)).startswith(said)


def test_numbers_that_are_not_finite_go_into_json_too():
    assert report_with({"a": (1.0, 1.0)}, saved=float("inf")).to_dict()["saved"] is None
