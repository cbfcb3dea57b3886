"""What a step is expected to take: its parts, how often they count, and what is refused. Nothing is run."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import msbp_jax as msbp
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.choice.costs.coefficients import COEFFICIENTS
from msbp_jax.kernels.choice.costs.work import joined
from msbp_jax.rules._work import dense_work, forward_work, sparse_work
from msbp_jax.transform import _estimate
from msbp_jax.transform._estimate import LayerEstimate, StepEstimate, estimate_step, with_update
from msbp_jax.transform._gradients import needed_gradients
from msbp_jax.transform._plan import make_plan
from msbp_jax.transform._program import trace

NATIVE = pytest.mark.skipif("native" not in msbp.backends()["select"], reason="the native kernels were not built")


def program(function, plan, params, *args, backend=None, **options):
    return trace(function, make_plan(plan, 1), backend, params, args, {}, **options)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["first"])
    return jax.nn.relu(hidden @ params["second"]) @ params["last"]


WEIGHTS = {"first": jnp.ones((256, 1024)), "second": jnp.ones((1024, 1024)), "last": jnp.ones((1024, 64))}
X = jnp.ones((1024, 256))
TOP_K = msbp.top_k(density=0.04, rows_per_group=32)


def of_mlp(plan, optimizer=None, **options):
    step = estimate_step(program(mlp, plan, WEIGHTS, X), **options)
    return step if optimizer is None else with_update(step, optimizer, WEIGHTS)


@NATIVE
def test_the_parts_of_a_step():
    step = of_mlp({"second": TOP_K, "*": msbp.dense()})
    layers = {layer.name: layer for layer in step.layers}
    assert list(layers) == ["first", "second", "last"]
    assert layers["first"].dense == layers["first"].sparse
    assert layers["second"].speed_up > 3
    assert layers["first"].speed_up == 1
    assert step.optimizer == 0
    assert min(step.forward, step.rest) > 0
    # Twice the forward, but for the first layer's inputs, which have no gradient.
    dense = sum(layer.dense for layer in step.layers)
    assert 1.3 < dense / step.forward < 2.2
    assert step.plain == pytest.approx(step.forward + step.rest + dense)
    assert step.sparse == pytest.approx(step.plain - layers["second"].dense + layers["second"].sparse)
    assert 1.2 < step.speed_up < 2


@NATIVE
def test_a_narrow_layer_at_a_high_density_gains_nothing():
    params, x = {"w": jnp.ones((64, 64))}, jnp.ones((64, 64))
    step = estimate_step(program(lambda p, x: x @ p["w"], msbp.top_k(density=0.9), params, x))
    assert step.speed_up < 1


def test_speed_ups_of_what_takes_nothing():
    assert LayerEstimate(name="w", dense=0.0, sparse=0.0).speed_up == 1
    assert StepEstimate(forward=0.0, rest=0.0, optimizer=0.0, layers=()).speed_up == 1


def test_an_optimizer_counts_by_what_it_keeps():
    plain, adam = (of_mlp(TOP_K, optimizer=tx).optimizer for tx in (optax.sgd(0.1), optax.adam(1e-3)))
    assert 1.5 * plain < adam < 3 * plain
    masked = optax.masked(optax.adam(1e-3), {"first": True, "second": False, "last": False})
    assert plain < of_mlp(TOP_K, optimizer=masked).optimizer < adam
    several = [WEIGHTS["first"], WEIGHTS["second"], jnp.ones(4, jnp.int8)]  # not of dicts, and not all is trained
    for mask in ([True, False, None], [True, False, False]):
        assert with_update(of_mlp(TOP_K), optax.masked(optax.adam(1e-3), mask), several).optimizer > 0
    with pytest.raises(ValueError, match=r"optimizer.init must take the parameters of the model, and does not"):
        with_update(of_mlp(TOP_K), masked, several)


@NATIVE
def test_a_share_that_only_the_run_tells():
    few, many, unsaid = (of_mlp(msbp.skip_zero_rows(), share=s) for s in (0.125, 0.5, None))
    assert few.speed_up > many.speed_up > unsaid.speed_up
    assert unsaid.speed_up <= 1
    assert of_mlp(msbp.dithered(4), share=0.1).speed_up > of_mlp(msbp.dithered(4)).speed_up


@NATIVE
def test_rows_that_are_drawn_where_the_gradient_enters():
    known = of_mlp(msbp.sample_rows(density=0.25))
    assert known.layers[0].name == "@outputs"
    assert (known.layers[0].dense, known.layers[0].sparse > 0) == (0, True)
    assert known.speed_up == pytest.approx(of_mlp(msbp.sample_rows(density=0.25), share=0.25).speed_up)
    assert known.speed_up > 1.2
    assert of_mlp(msbp.sample_rows(efficiency=0.95)).speed_up < 1
    assert of_mlp(msbp.sample_rows(efficiency=0.95), share=0.25).speed_up > 1.2


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_is_one(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\].*got"):
        of_mlp(TOP_K, share=share)


def test_sparse_weights_are_refused():
    params = {"kernel": jnp.ones((64, 64))}
    pruned = msbp.prune({"params": params}, density=0.1)
    weight = msbp.weights.SparseWeight(pruned["params"]["kernel"], pruned["sparsity"]["kernel"])
    with pytest.raises(ValueError, match=r"no model of what a step with sparse weights takes, and kernel is sparse\."):
        estimate_step(program(lambda p, x: x @ p["kernel"], TOP_K, {"kernel": weight}, jnp.ones((32, 64))))


def test_every_step_of_a_loop_counts():
    def cells(w, xs):
        return jax.lax.scan(lambda c, x: (jnp.tanh(c @ w + x), c), xs[0], xs)[1]

    short, long = (estimate_step(program(cells, TOP_K, jnp.ones((128, 128)), jnp.ones((n, 64, 128)))) for n in (4, 16))
    assert long.layers[0].dense == pytest.approx(4 * short.layers[0].dense)
    assert long.layers[0].sparse == pytest.approx(4 * short.layers[0].sparse)
    assert long.forward == pytest.approx(4 * short.forward)
    assert 2 < long.rest / short.rest < 6


def test_members_of_a_batch_of_layers_count_once_each():
    members = lambda w, x: jnp.einsum("eri,eio->ero", x, w)
    few, many = (estimate_step(program(members, TOP_K, jnp.ones((n, 64, 128)), jnp.ones((n, 96, 64)))) for n in (2, 8))
    assert 2 < many.layers[0].sparse / few.layers[0].sparse <= 4.1
    assert 1 < many.layers[0].dense / few.layers[0].dense <= 4.1


def test_parts_of_a_choice_count_each_for_itself():
    step = of_mlp(msbp.split(dx=msbp.dense(), dw=TOP_K))
    both = of_mlp(TOP_K)
    assert both.sparse < step.sparse < both.plain * 1.2


def test_whatever_a_program_holds(recwarn):
    """Attention, norms, pooling, batch statistics, checkpoints, conditions; every kind of work has its seconds."""

    class Everything(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(64, (3, 3))(x))), (2, 2), (2, 2))
            x = nn.pool(nn.Conv(64, (3, 3), feature_group_count=4)(x), 0.0, jax.lax.add, (2, 2), (2, 2), "VALID")
            x = x.reshape(len(x), -1, 64)
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = nn.remat(nn.Dense)(64)(x)
            x = jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: jnp.sort(x, axis=-1), x)
            return nn.RNN(nn.OptimizedLSTMCell(64))(x)

    x = jnp.ones((4, 8, 8, 3))
    variables = jax.eval_shape(lambda x: Everything().init(jax.random.key(0), x), x)
    others = {"batch_stats": variables["batch_stats"]}
    apply = lambda params, others, x: Everything().apply({"params": params, **others}, x, mutable=["batch_stats"])
    plan = msbp.memorized(msbp.top_k(density=0.1, rows_per_group=None), decay=0.8)
    traced = program(apply, plan, variables["params"], others, x, states=1, first_is_output=True)
    step = estimate_step(traced)
    assert step.rest > 0
    assert {layer.name.split("/")[0] for layer in step.layers} >= {"Conv_0", "Conv_1", "MultiHeadDotProductAttention_0"}
    needed = needed_gradients(traced)
    uses = [_estimate._use(site, needed) for site in traced.sparse_sites]
    works = [_estimate._gradient_work(traced)]
    for site, use in zip(traced.sparse_sites, uses, strict=True):
        works += [forward_work(use), dense_work(use), sparse_work(use, site.sparsifier, None, 1.0)]
    kinds = joined(*works)
    assert {kind: len(units) for kind, units in kinds.items()} == {kind: len(COEFFICIENTS[kind]) for kind in kinds}


def test_a_program_under_an_axis_and_one_without_a_gradient():
    named = lambda w, x: jax.lax.pmean(x @ w, "batch")
    assert estimate_step(program(named, TOP_K, jnp.ones((64, 64)), jnp.ones((32, 64)))).plain > 0


def test_a_branch_for_another_platform_is_none():
    def either(w, x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ w, tpu=lambda x: (x @ w) @ (w @ w))

    step = estimate_step(program(either, TOP_K, jnp.ones((64, 64)), jnp.ones((32, 64))))
    assert [layer.name for layer in step.layers] == ["params"]


def test_on_an_accelerator_the_roofline_tells(monkeypatch):
    cpu = of_mlp(TOP_K)
    monkeypatch.setattr(target, "device", lambda: target.Device("gpu", "NVIDIA H100 80GB HBM3"))
    step = of_mlp({"second": msbp.top_k(density=0.04, rows_per_group=128), "*": msbp.dense()})
    assert step.plain < cpu.plain / 10
    assert step.layers[0].dense == step.layers[0].sparse
    assert step.layers[1].dense != step.layers[1].sparse


FROZEN = {"w": jnp.ones((512, 512)), "v": jnp.ones((512, 512))}


def of_two(frozen, params=FROZEN, plan=TOP_K):
    function = lambda p, x: jnp.tanh(x @ frozen(p["w"])) @ p["v"]
    return estimate_step(program(function, plan, params, jax.ShapeDtypeStruct((128, 512), jnp.float32)))


def test_weights_without_a_gradient_have_no_backward():
    trained, stopped = of_two(lambda w: w), of_two(jax.lax.stop_gradient)
    int8 = of_two(lambda w: w.astype(jnp.float32) * 0.01, {**FROZEN, "w": jax.ShapeDtypeStruct((512, 512), jnp.int8)})
    layers = {layer.name: layer for layer in trained.layers}
    for frozen in (stopped, int8):
        (layer,) = frozen.layers
        assert layer.name == "v"
        assert layer.dense == pytest.approx(layers["v"].dense / 2, rel=0.2)  # tanh(..) needs none
        assert layer.sparse < layers["v"].sparse
        assert frozen.rest > trained.rest / 3  # and no negative rest that hides it
    assert stopped.plain < trained.plain - layers["w"].dense


def test_a_frozen_weight_above_a_trained_one_hands_the_gradient_on():
    frozen_last = lambda p, x: jnp.tanh(x @ p["w"]) @ jax.lax.stop_gradient(p["v"])
    both = of_two(lambda w: w)
    step = estimate_step(program(frozen_last, TOP_K, FROZEN, jax.ShapeDtypeStruct((128, 512), jnp.float32)))
    assert [layer.name for layer in step.layers] == ["w", "v"]
    assert step.layers[1].dense == pytest.approx(both.layers[1].dense / 2, rel=0.2)
    assert step.rest > 0


def test_what_no_gradient_comes_back_through_has_none():
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    looped = lambda c, w: (jnp.tanh(c @ w), None)
    for function in (
        lambda w, x: (x @ w).astype(jnp.int32),
        lambda w, x: jax.lax.stop_gradient(x @ w),
        lambda w, x: jax.lax.stop_gradient(jax.checkpoint(lambda w: x @ w)(w)),
        lambda w, x: jax.lax.stop_gradient(jax.lax.scan(looped, x, w[None])[0]),
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda w: (x @ w) > 0, lambda w: (x @ w) < 0, w),
    ):
        assert estimate_step(program(function, TOP_K, jnp.ones((64, 64)), x)).layers == ()
    kept = lambda w, x: jax.lax.cond(x.sum() > 0, jax.nn.relu, jnp.tanh, jax.lax.scan(looped, x, w[None])[0])
    assert len(estimate_step(program(kept, TOP_K, jnp.ones((64, 64)), x)).layers) == 1
