"""The work of a program follows from its equations: what is counted, how often, and as which kind."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax.kernels.choice import cpu, target
from msbp_jax.kernels.choice.costs import accelerators, coefficients
from msbp_jax.kernels.choice.costs.coefficients import COEFFICIENTS, seconds
from msbp_jax.kernels.choice.costs.equations import listing
from msbp_jax.kernels.choice.costs.memory import KEPT_BYTES, fresh_memory
from msbp_jax.kernels.choice.costs.optimizers import work_of_update
from msbp_jax.kernels.choice.costs.work import joined, times, work_of, work_of_run
from msbp_jax.kernels.choice.layer import Layer
from msbp_jax.kernels.rows.ladder import SHARES, rungs

NATIVE = pytest.mark.skipif("native" not in msbp.backends()["select"], reason="the native kernels were not built")


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def work(function, *arguments, share=1.0, **options):
    return work_of(jax.make_jaxpr(function)(*arguments), share, **options)


def test_a_product_and_its_gradients():
    x, w, g = f32(32, 48), f32(48, 64), f32(32, 64)
    arrays = 32 * 48 + 48 * 64 + 32 * 64
    expected = (1, 32 * 48 * 64, arrays)
    assert work(jnp.matmul, x, w)["product, rows by columns"] == expected
    assert work(lambda x, w, g: jax.vjp(lambda x: x @ w, x)[1](g), x, w, g)["product, rows by rows"] == expected
    assert work(lambda x, w, g: jax.vjp(lambda w: x @ w, w)[1](g), x, w, g)["product, columns by columns"] == expected
    assert work(jnp.matmul, f32(32, 48), f32(48, 4))["product, few"] == (1, 32 * 48 * 4, 32 * 48 + 48 * 4 + 32 * 4)
    batched = work(jnp.matmul, f32(7, 32, 48), f32(7, 48, 64))
    assert batched["product, batched"] == (1, 7, 7 * 32 * 48 * 64, 7 * arrays)


def test_a_product_of_groups_of_rows():
    x, w, sizes = f32(32, 48), f32(5, 48, 64), jax.ShapeDtypeStruct((5,), jnp.int32)
    assert work(lax.ragged_dot, x, w, sizes)["product, rows by columns"][1] == 5 * 32 * 48 * 64
    back = lambda x, w, sizes: jax.grad(lambda w: lax.ragged_dot(x, w, sizes).sum())(w)
    assert work(back, x, w, sizes)["product, rows by columns"][1] == 5 * 32 * 48 * 64


def test_what_nobody_asks_for_is_not_counted():
    both = lambda x, w, g: jax.vjp(jnp.matmul, x, w)[1](g)
    arguments = f32(32, 48), f32(48, 64), f32(32, 64)
    kinds = {kind for kind in work(both, *arguments) if kind.startswith("product")}
    assert kinds == {"product, rows by rows", "product, columns by columns"}  # and no forward
    kinds = {kind for kind in work(both, *arguments, wanted=(False, True)) if kind.startswith("product")}
    assert kinds == {"product, columns by columns"}


CONV = functools.partial(lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("window", "stride", "groups", "expected"),
    [
        (3, 1, 1, ["", "", ", kernel"]),
        (3, 2, 1, ["", ", dilated", ", kernel"]),
        (1, 1, 1, [", one position", ", one position", ", kernel of one position"]),
        (3, 1, 8, [", grouped"] * 3),
    ],
)
def test_a_convolution_and_its_gradients(window, stride, groups, expected):
    forward = functools.partial(CONV, window_strides=(stride, stride), feature_group_count=groups)
    x, w = f32(2, 8, 8, 8), f32(window, window, 8 // groups, 16)
    g = jax.eval_shape(forward, x, w)
    programs = (
        lambda x, w, g: forward(x, w),
        lambda x, w, g: jax.vjp(lambda x: forward(x, w), x)[1](g),
        lambda x, w, g: jax.vjp(lambda w: forward(x, w), w)[1](g),
    )
    kinds = [next(k for k in work(program, x, w, g) if k.startswith("convolution")) for program in programs]
    assert kinds == [f"convolution{suffix}" for suffix in expected]
    adds = work(programs[0], x, w, g)[kinds[0]][1]
    assert adds == g.size * window**2 * 8 // groups


def test_loops_through_entries_are_one_whatever_stands_in_them():
    x = f32(32, 64)
    loops, computed, costly, _, near, far = work(lambda x: jax.nn.relu(x + 1) * jnp.tanh(x), x)["loops"]
    assert (loops, costly, far) == (1, 32 * 64, 0)
    assert computed == 3 * 32 * 64
    assert near == 2 * 4 * 32 * 64  # read once, written once
    assert work(lambda x: (x * x).sum(axis=0), x)["loops"][0] == 0  # a sum takes the loop with it
    assert work(lambda x: jnp.exp(x) @ x.T, x)["loops"][0] == 1
    assert work(lambda x: x.T.reshape(-1, 2), x).get("loops", (0,))[0] == 0


def test_a_scan_counts_its_turns_and_what_is_the_same_in_all_of_them_once():
    def run(w, x, xs):
        return lax.scan(lambda c, x: (c @ jnp.concatenate([w, w], axis=1) + x, None), x, xs)[0]

    found = work(run, f32(32, 16), f32(16, 32), f32(9, 16, 32))
    assert found["product, rows by columns"][0] == 9
    assert found["joining"][0] == 1
    assert found["loop"] == (1, 9)


def test_of_branches_the_dearest_counts_or_the_rung_of_the_share():
    x = f32(64, 64)
    found = work(lambda i, x: lax.cond(i, lambda x: x, lambda x: x @ x, x), jax.ShapeDtypeStruct((), bool), x)
    assert found["product, rows by columns"][0] == 1
    assert len(rungs(1024)) == len(SHARES)
    rows = msbp.Rows(f32(1024, 64), f32(1024))
    product = functools.partial(kernels.grad_input, feature_axis=1, backend="xla")
    adds = [work(product, rows, f32(32, 64), share=s)["product, rows by rows"][1] for s in (0.0625, 0.2, 1.0)]
    assert adds == [64 * 32 * 64, 256 * 32 * 64, 1024 * 32 * 64]


def test_a_loop_of_unknown_length_and_devices():
    run = lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
    assert work(run, f32(32, 32))["product, rows by columns"][0] == 1
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    assert work(split, f32(32, 32))["product, rows by columns"][0] == 1


def test_what_is_neither_product_nor_loop():
    x, at = f32(40, 20), jax.ShapeDtypeStruct((6,), jnp.int32)
    assert work(lambda x: x.sum(axis=1), x)["reduction"] == (1, 800, 0)
    assert work(lambda x: x.sum(axis=0), x)["reduction"] == (1, 0, 800)
    assert work(lambda x, at: x[at], x, at)["gather"] == (1, 120)
    assert work(lambda x, at: x.at[at].add(1.0), x, at)["scatter"] == (1, 120, 800)
    assert work(lambda x: jnp.sort(x, axis=0), x)["sort"][0] == 1
    assert work(lambda x: jnp.cumsum(x, axis=0), x)["scan of numbers"] == (1, 800)
    assert work(lambda x: lax.dynamic_update_slice(x, x[:2], (3, 0)), x)["copy"] == (1, 160)
    assert work(lambda key: jax.random.uniform(key, (40,)), jax.eval_shape(jax.random.key, 0))["random"][1] > 0
    image = f32(2, 8, 8, 4)
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    assert work(pool, image)["pooling"] == (1, 2 * 4 * 4 * 4 * 4)
    assert work(lambda x: jax.grad(lambda x: pool(x).sum())(x), image)["pooling, back"] == (1, 512)


@NATIVE
def test_native_kernels_count_as_the_choice_among_them_does():
    g, x, w = f32(128, 64), f32(128, 32), f32(32, 64)
    for group in (1, 32):
        layer = Layer(128, 32, 64, 6, group)
        kind = cpu.kind_of("native", 6, group)
        p = jax.eval_shape(functools.partial(kernels.select, k=6, rows_per_group=group), g)
        assert work(functools.partial(kernels.select, k=6, rows_per_group=group), g)["native select"] == cpu.work(
            "select, native", layer
        )
        for product, other in ((kernels.grad_input, w), (kernels.grad_weight, x)):
            found = work(functools.partial(product, feature_axis=1), p, other)
            assert found[f"{kind} {product.__name__}"] == cpu.work(kind, layer)
    rows, entries = msbp.Rows(g, f32(128)), msbp.Entries(g)
    for product, other in ((kernels.grad_input, w), (kernels.grad_weight, x)):
        call = functools.partial(product, feature_axis=1)
        found = work(call, rows, other, share=0.25)[f"native rows_{product.__name__}"]
        assert found[1] == 0.25 * 128 * 32 * 64
        assert work(call, entries, other, share=0.1)[f"native entries_{product.__name__}"][1] == pytest.approx(
            0.1 * 128 * 32 * 64
        )
    members = jax.vmap(functools.partial(kernels.select, k=6, rows_per_group=1))
    assert work(members, f32(3, 128, 64))["native select"] == tuple(
        3 * unit for unit in cpu.work("select, native", Layer(128, 1, 64, 6, 1))
    )


def test_memory_that_is_got_anew():
    few, many = f32(64, 64), f32(2048, 2048)
    double = lambda x: jnp.exp(x) @ x
    of = lambda function, x, **options: fresh_memory(listing(jax.make_jaxpr(function)(x)), **options)
    assert of(double, few) == 0
    assert of(lambda x: (double(x) @ x).sum(), many) == 0 or many.size * 4 < KEPT_BYTES
    large = f32(4096, 4096)
    assert of(lambda x: (jnp.exp(x) @ x).sum(), large) == 2 * 4 * large.size
    assert of(lambda x: x + 1, large) == 4 * large.size  # a result, by itself
    assert of(lambda x: x + 1, large, within=True) == 4 * large.size
    assert work_of_run(jax.make_jaxpr(double)(few))["program"] == (1, 0)


def test_an_update_moves_parameters_gradients_and_state():
    import optax

    params = {"w": f32(8, 4), "b": f32(4)}
    assert work_of_update(optax.sgd(0.1), params) == {"update": (2, 3 * 4 * 36)}
    adam = work_of_update(optax.adam(0.1), params)["update"]
    assert adam == (2, 3 * 4 * 36 + 2 * (2 * 4 * 36 + 4))


def test_work_adds_up():
    one, two = {"a": (1.0, 2.0)}, {"a": (3.0, 4.0), "b": (5.0,)}
    assert joined(one, two) == {"a": (4.0, 6.0), "b": (5.0,)}
    assert times(two, 2) == {"a": (6.0, 8.0), "b": (10.0,)}
    kind = next(iter(COEFFICIENTS))
    units = tuple(1.0 for _ in COEFFICIENTS[kind])
    assert seconds({kind: units}) == pytest.approx(sum(COEFFICIENTS[kind]))


def test_on_an_accelerator_rates_are_the_published_ones(monkeypatch):
    found = work(lambda x, w: jax.nn.relu(x @ w).sum(axis=0), f32(4096, 4096), f32(4096, 4096))
    device = target.Device("gpu", "NVIDIA H100 80GB HBM3")
    expected = 2 * 4096**3 / (989e12 * 0.75)
    assert expected < accelerators.seconds(device, found) < 2 * expected
    slower = accelerators.seconds(target.Device("gpu", "NVIDIA A100-SXM4-80GB"), found)
    assert slower > 2 * accelerators.seconds(device, found)
    monkeypatch.setattr(target, "device", lambda: device)
    assert coefficients.seconds(found) == accelerators.seconds(device, found)
    assert coefficients.seconds({"seconds": (2.5,)}) == 2.5
