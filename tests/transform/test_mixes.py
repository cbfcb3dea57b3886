"""Below batch norm no row is 0 and the mean of the gradient is: which sites the report names, and that it is so."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import msbp_jax as msbp
from msbp_jax.transform._estimate import LayerEstimate, StepEstimate
from msbp_jax.transform._make_report import _mixed
from msbp_jax.transform._mixes import find_mixing
from msbp_jax.transform._shares import Shares

X = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
SKIP = {"@outputs": msbp.sample_rows(density=0.5), "*": msbp.skip_zero_rows()}
NORMS = {
    "batch": lambda: nn.BatchNorm(use_running_average=False),
    "running": lambda: nn.BatchNorm(use_running_average=True),
    "layer": nn.LayerNorm,
    "group": lambda: nn.GroupNorm(4),
    "instance": nn.InstanceNorm,
}


class Net(nn.Module):
    norm: str

    @nn.compact
    def __call__(self, x):
        norm = NORMS[self.norm]
        x = nn.relu(norm()(nn.Conv(64, (3, 3), name="first")(x)))
        x = nn.relu(x + norm()(nn.Conv(64, (3, 3), name="second")(x)))
        x = nn.Conv(64, (3, 3), name="third")(x).mean((1, 2))
        return nn.Dense(10, name="head")(x)


class Attention(nn.Module):
    norm: str = ""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 64)(tokens)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(64, name="out")(nn.gelu(nn.Dense(128, name="in")(x)))
        x = NORMS[self.norm]()(x) if self.norm else x
        return nn.Dense(10, name="head")(x)


class Recurrent(nn.Module):
    norm: str = ""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(64))(x)
        x = NORMS[self.norm]()(x) if self.norm else x
        return nn.Dense(10, name="head")(x[:, -1])


def mixing(module, x, plan=SKIP):
    model = msbp.sparse_vjp(module, plan)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return found(lambda v, x: module.apply(v, x, mutable=["batch_stats"])[0], variables, x)


def found(function, params, *args):
    return find_mixing(msbp.sparse_vjp(function, msbp.skip_zero_rows())._program(params, args, {}))


def sites(names):
    return {name.split("/")[-2] for name in names if not name.startswith("@")}


@pytest.mark.parametrize("norm", NORMS)
def test_only_a_norm_over_the_batch_mixes_rows_and_only_below_it(norm):
    told = mixing(Net(norm), X)
    assert sites(told.mixed) == ({"first", "second"} if norm == "batch" else set())
    assert sites(told.centred) == ({"first", "second"} if norm == "batch" else set())


def test_attention_and_loops_over_time_leave_examples_apart():
    tokens, series = jnp.zeros((16, 8), jnp.int32), jnp.ones((16, 8, 4))
    assert not mixing(Attention(), tokens).mixed
    assert not mixing(Attention("layer"), tokens).mixed
    below = mixing(Attention("batch"), tokens)
    assert sites(below.mixed) == {"query", "key", "value", "out", "in"}
    assert sites(below.centred) == {"out"}  # what others read too may change them
    assert not mixing(Recurrent(), series).mixed
    assert "head" not in sites(mixing(Recurrent("batch"), series).mixed)
    assert mixing(Recurrent("batch"), series).mixed


W = {"w": jnp.ones((6, 64)), "v": jnp.ones((64, 5))}
ROWS = jnp.ones((16, 6))


@pytest.mark.parametrize(
    ("between", "mixed", "centred"),
    [
        (lambda h: h - h.mean(0), True, True),
        (lambda h: (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-3), True, True),
        (lambda h: h - jax.lax.stop_gradient(h.mean(0)), False, False),
        (lambda h: h + h.mean(0), True, False),
        (lambda h: h - 0.5 * h.mean(0), True, False),  # a part of the mean, or more than it
        (lambda h: h - h.mean(0) / 3, True, False),
        (lambda h: h - h.sum(0), True, False),
        (lambda h: h - h.sum(0) * (1 / 16), True, True),
        (lambda h: (1 - h) - h.mean(0), True, False),
        (lambda h: h.mean(0) - (h + 1), True, True),
        (lambda h: (h**2).mean(0) - 2 * h.mean(0) ** 2 + 0 * h, True, False),
        (lambda h: h - h.mean(), True, False),  # over the features, too
        (lambda h: h - h.mean(1, keepdims=True), False, False),
        (lambda h: jax.nn.softmax(h, axis=1), False, False),
        (lambda h: jax.nn.softmax(h, axis=0), True, False),
        (lambda h: (h.reshape(4, 4, 64) - h.reshape(4, 4, 64).mean(0)).reshape(16, 64), False, False),  # axis lost
        (lambda h: h * (h.T @ h).sum(), True, False),
        (lambda h: jax.lax.cond(h.sum() > 0, lambda h: h - h.mean(0), lambda h: 2 * h, h), True, False),
        (lambda h: jax.checkpoint(lambda h: h - h.mean(0))(h), True, True),
        (lambda h: h[::-1], False, False),
        (lambda h: h / jnp.abs(h).max(), False, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Nothing is sparse")
def test_what_mixes_rows(between, mixed, centred):
    with jax.numpy_rank_promotion("allow"):
        told = found(lambda w, x: between(x @ w["w"]) @ w["v"], W, ROWS)
    assert told.mixed == ({"w"} if mixed else set())
    assert told.centred == ({"w"} if centred else set())


@pytest.mark.parametrize(
    "shaped",
    [
        lambda h, out: {"aux": h.mean(0), "out": out},
        lambda h, out: {"attention": jnp.ones((8, 4, 4)) * h.mean(), "out": out},
        lambda h, out: out.reshape(-1),
        lambda h, out: out.reshape(-1, 1),
        lambda h, out: (out**2).mean(),
    ],
)
def test_rows_are_those_of_the_data_whatever_comes_out(shaped):
    def normed(w, x):
        h = x @ w["w"]
        h = h - h.mean(0, keepdims=True)
        return shaped(h, h @ w["v"])

    assert found(normed, W, ROWS).mixed == {"w"}
    assert found(normed, W, ROWS).centred == {"w"}


@pytest.mark.filterwarnings("ignore:Nothing is sparse")
def test_rows_of_another_argument_are_none_of_a_layer_without_them():
    def classes(w, x, table):
        return jax.nn.log_softmax((x @ w["w"]) @ table.T)

    assert not found(classes, W, ROWS, jnp.ones((10, 64))).mixed
    last = lambda w, series: jax.nn.softmax(series @ w["w"], axis=0)[-1] @ w["v"]  # time first, then examples
    assert not found(last, W, jnp.ones((7, 16, 6))).mixed


def test_a_loss_and_masked_rows_mix_nothing():
    assert not found(lambda w, x: (((x @ w["w"]) @ w["v"]) ** 2).mean(), W, ROWS).mixed
    mask = jnp.arange(16) < 12

    def masked(w, x, mask):
        h = jnp.where(mask[:, None], x @ w["w"], 0.0)
        return (h - h.sum(0, keepdims=True) / 12) @ w["v"]

    assert not found(masked, W, ROWS, mask).mixed  # padding stays 0
    assert not found(lambda w, x: (x @ w["w"] - (x @ w["w"]).mean(0, keepdims=True)) @ w["v"], W, ROWS[:1]).mixed


def test_the_report_says_what_is_idle_and_counts_nothing_as_skipped_there():
    model = msbp.sparse_vjp(Net("batch"), SKIP)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    report = model.report(variables, X, mutable=["batch_stats"])
    text = " ".join(str(report).split())
    assert "first/kernel, second/kernel: below a norm over the batch, which mixes the rows, so that none" in text
    native = "which msbp.dense(native=True) has without a search for rows."
    assert (native if "native" in msbp.backends()["select"] else "leave them dense (msbp.dense()).") in text
    assert dict(report.shares).get("head/kernel") == 0.5
    alone = msbp.sparse_vjp(lambda w, x: (h := x @ w) - h.mean(0, keepdims=True), msbp.sample_rows(density=0.5))
    report = alone.report(jnp.ones((6, 64)), ROWS)
    assert "That is all that is sparse: it saves nothing here, and a memory for it is idle." in " ".join(report.notes)
    assert dict(report.shares) == {"params": 1.0}


def test_what_gains_below_a_norm_gains_by_native_kernels_and_is_told_so():
    shares = Shares(
        by_site={"a": 1.0, "b": 1.0}, entering=None, said="", mixed=("a", "b"), kept_by_rows=True, unused=""
    )
    layers = (LayerEstimate(name="a", dense=2.0, sparse=1.0), LayerEstimate(name="b", dense=1.0, sparse=1.0))
    step = StepEstimate(forward=1.0, rest=1.0, optimizer=0.0, layers=layers)
    rows = [types.SimpleNamespace(name=name, backend="native, images that are kept") for name in "ab"]
    said = _mixed(shares, rows, step)
    assert (
        "nothing is skipped. What a gains is the gain of native kernels with all images, which msbp.dense(nat" in said
    )
    assert said.endswith("; leave the others dense (msbp.dense()).")
    assert "saves nothing" not in said
    rows[0].backend = "native"  # of a matrix product, whose estimate is not as exact as that
    assert "saves nothing" in _mixed(shares, rows, step)


def test_the_memory_of_one_choice_for_the_batch_stays_0_below_batch_norm():
    model = msbp.sparse_vjp(Net("batch"), msbp.memorized(msbp.top_k(density=0.25, rows_per_group=None), decay=0.8))
    variables = model.init(jax.random.key(0), X)
    (said,) = model.report(variables, X, mutable=["batch_stats"]).notes
    assert said.startswith("first/kernel, second/kernel: right below a norm over the batch, ")
    labels = jnp.arange(16) % 10

    def loss_fn(params, memory):
        logits, _ = model.apply({**variables, "params": params}, X, memory=memory, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    memory = model.init_memory(variables, X, mutable=["batch_stats"])
    memory = jax.jit(msbp.value_and_grad(loss_fn))(variables["params"], memory)[2]
    norms = {name.split("/")[0]: float(value) for name, value in msbp.metrics(memory).items()}
    assert max(norms["first"], norms["second"]) < 1e-5 * norms["third"]
    grouped = msbp.sparse_vjp(Net("batch"), msbp.memorized(msbp.top_k(density=0.25, rows_per_group=8), decay=0.8))
    assert not grouped.report(variables, X, mutable=["batch_stats"]).notes
