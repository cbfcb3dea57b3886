"""Convolutions of any geometry against a masked twin: plain JAX whose output's gradient is masked."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import assert_trees_close, assert_trees_equal, masked

import msbp_jax as msbp
from benchmarks.suite import convolutions

N, K = 12, 3


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)  # nothing to compile for a shape


def convolution(spatial, window, batch=3, features=4, **options):
    """Return (function, x, w) of a convolution over so many positions."""
    groups, batches = options.get("feature_group_count", 1), options.get("batch_group_count", 1)
    numbers = options.pop("dimension_numbers", ("N" + "HWD"[: len(spatial)] + "C", "HWD"[: len(spatial)] + "IO"))
    lhs, rhs = numbers[0], numbers[1]
    out = numbers[2] if len(numbers) == 3 else lhs
    sizes = {"N": batch * batches, "C": features, "I": features // groups, "O": N}
    sizes |= dict(zip("HWD", spatial, strict=False))
    x = normal(0, [sizes[axis] for axis in lhs])
    sizes |= dict(zip("HWD", window, strict=False))
    w = normal(1, [sizes[axis] for axis in rhs]) / 4
    options = {"window_strides": (1,) * len(spatial), "padding": "SAME"} | options
    return (
        lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=(lhs, rhs, out), **options),
        x,
        w,
        out.index("C"),
    )


GEOMETRIES = {
    "1d causal": ((7,), (3,), {"padding": [(2, 0)]}),
    "2d same": ((6, 5), (3, 3), {}),
    "2d one by one": ((4, 5), (1, 1), {"padding": "VALID"}),
    "2d strided and dilated": ((9, 8), (3, 2), {"window_strides": (2, 3), "rhs_dilation": (2, 1), "padding": "VALID"}),
    "2d cut off": ((8, 8), (3, 3), {"padding": [(-1, 2), (3, -2)], "window_strides": (2, 1)}),
    "2d transposed": ((4, 4), (3, 3), {"lhs_dilation": (2, 2), "padding": [(2, 1), (1, 2)]}),
    "2d channels first": ((6, 5), (3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "2d mixed order": ((6, 5), (2, 3), {"dimension_numbers": ("HNWC", "OHIW", "WCNH")}),
    "3d": ((4, 3, 5), (2, 2, 3), {"window_strides": (1, 2, 2)}),
    "feature groups": ((5, 5), (3, 3), {"feature_group_count": 2}),
    "depthwise": ((5, 5), (3, 3), {"feature_group_count": 4}),
    "batch groups": ((5, 5), (3, 3), {"batch_group_count": 2}),
}
# "example" is one image; a fifth group is shorter than the others.
GROUPS = [1, 5, "example", None]


def twin_of(function, axis, group):
    def twin(w, x):
        y = function(w, x)
        out = jnp.moveaxis(y, axis, -1) if axis != 1 or y.ndim < 3 else jnp.moveaxis(y, 1, -1)
        return jnp.moveaxis(masked(out, K, group), -1, axis)

    return twin


def gradients(function, w, x):
    return jax.jit(jax.grad(lambda w, x: (jnp.sin(function(w, x))).sum(), argnums=(0, 1)))(w, x)


ALL_GROUPS = ("2d same", "2d strided and dilated", "2d transposed", "3d")


@functools.cache
def plain(name):
    """Return a geometry's function, operands and axis of features, with the gradients of plain JAX."""
    spatial, window, options = GEOMETRIES[name]
    function, x, w, axis = convolution(spatial, window, **dict(options))
    return function, x, w, axis, gradients(function, w, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "group"),
    [
        (name, group)
        for name in GEOMETRIES
        for group in (GROUPS if name in ALL_GROUPS else (5, None))
        if name != "2d mixed order"
    ],
)
def test_masked_twin(name, group):
    function, x, w, axis, unmasked = plain(name)
    y = jax.eval_shape(function, w, x)
    rows = y.size // (N * y.shape[0]) if group == "example" else group
    want = gradients(twin_of(function, axis, rows), w, x)
    assert not np.allclose(want[0], unmasked[0])  # the mask bites
    for backend in ("xla", "dense"):  # on patches, and whole
        f = msbp.sparse_vjp(function, msbp.top_k(k=K, rows_per_group=group), min_features=1, backend=backend)
        memory = f.init_memory(w, x)
        assert_trees_close(gradients(lambda w, x, f=f, m=memory: f(w, x, memory=m), w, x), want, rtol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", GEOMETRIES)
def test_keeping_everything_is_plain_and_memory_is_what_is_left(name):
    function, x, w, axis, unmasked = plain(name)
    everything = msbp.sparse_vjp(function, msbp.top_k(k=N), min_features=1)
    assert_trees_equal(gradients(lambda w, x: everything(w, x, memory={}), w, x), unmasked)
    f = msbp.sparse_vjp(function, msbp.memorized(msbp.top_k(k=K, rows_per_group=None), 0.5), min_features=1)
    memory = f.init_memory(w, x)
    assert memory["params"].residual.shape == (N,)
    loss = lambda w, m, x: jnp.sin(f(w, x, memory=m)).sum()
    _, _, after = jax.jit(msbp.value_and_grad(loss))(w, memory, x)
    y = np.asarray(jax.jit(function)(w, x))
    g = np.moveaxis(np.cos(y), axis, -1).reshape(-1, N)
    dropped = np.argsort(-np.abs(g).sum(0))[K:]
    want = np.zeros(N)
    want[dropped] = 0.5 * g.mean(0)[dropped]
    np.testing.assert_allclose(after["params"].residual, want, rtol=1e-4, atol=1e-6)


def test_one_choice_for_the_batch_runs_smaller_convolutions():
    """The compiled backward holds no convolution with all the output channels, nor a patch matrix."""
    function, x, w, _ = convolution((6, 6), (3, 3))
    f = msbp.sparse_vjp(function, msbp.top_k(k=K, rows_per_group=None), min_features=1)
    memory = f.init_memory(w, x)
    sparse = lambda w, x: f(w, x, memory=memory)
    pull = lambda fun: jax.jit(lambda w, x, g: jax.vjp(fun, w, x)[1](g)).lower(w, x, jnp.ones((3, 6, 6, N)))
    lines = [line for line in pull(sparse).as_text().splitlines() if "stablehlo.convolution" in line]
    results = sorted(line.split("->")[-1].split(" loc")[0].strip() for line in lines)
    assert results == sorted(["tensor<3x6x6x4xf32>", f"tensor<3x3x4x{K}xf32>"])  # dx, and dw of K channels
    assert not any(f"x{N}x" in line for line in lines)


LAYERS = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks/results/results.json").read_text())["conv"]["rows"]


@pytest.mark.skipif("native" not in msbp.backends()["select"], reason="the native kernels were not built")
def test_patches_are_chosen_where_they_are_measured_to_be_faster_than_dense():
    assert len(LAYERS) > 40
    chosen = {True: 0, False: 0}
    for row in LAYERS:
        layer = convolutions.Layer(*(row[field] for field in convolutions.Layer._fields))
        times = {name: ratio for name, ratio in row.items() if "patches" in name and name != "chosen"}
        on_patches = convolutions.chosen(layer)
        chosen[on_patches] += 1
        assert not on_patches or min(times.values()) > 1, row
        assert row["dense/batch"] > 0.9, row
    assert min(chosen.values()) >= 15


def test_the_report_says_how_a_convolution_runs_and_whether_it_pays():
    conv = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x, w = jnp.ones((32, 16, 16, 64)), jnp.ones((3, 3, 64, 64))
    (row,) = msbp.sparse_vjp(conv, msbp.top_k(density=0.1, rows_per_group=32)).report(w, x).sparse
    assert (row.backend, row.saved) == ("xla, dense", 0.0)
    assert "slower than the dense backward" in row.warning
    assert "patches are not measured to be faster" in row.warning
    (row,) = msbp.sparse_vjp(conv, msbp.top_k(density=0.1, rows_per_group=32), backend="xla").report(w, x).sparse
    assert (row.backend, row.saved) == ("xla, patches", pytest.approx(1 - 6 / 64))
    if "native" in msbp.backends()["select"]:
        deep = jnp.ones((32, 14, 14, 256)), jnp.ones((3, 3, 256, 256))
        (row,) = msbp.sparse_vjp(conv, msbp.top_k(density=0.1, rows_per_group=32)).report(deep[1], deep[0]).sparse
        assert (row.backend, row.warning) == ("native, patches", "")


@pytest.mark.parametrize("group", [1, 4, None])
def test_experts_of_a_ragged_product(group):
    x = jax.random.normal(jax.random.key(0), (10, 6))
    w = jax.random.normal(jax.random.key(1), (3, 6, N))
    sizes = jnp.array([4, 0, 6])
    function = lambda w, x: lax.ragged_dot(x, w, sizes)
    f = msbp.sparse_vjp(function, msbp.top_k(k=K, rows_per_group=group), min_features=1)
    memory = f.init_memory(w, x)
    grads = gradients(lambda w, x: f(w, x, memory=memory), w, x)
    assert_trees_close(grads, gradients(lambda w, x: masked(function(w, x), K, group), w, x))
    row = f.report(w, x).sparse[0]
    assert row.backend == ("xla, narrow" if group is None else "xla, dense")


def test_what_no_rule_takes_is_in_the_report():
    image = jnp.ones((1, 4, 4, 2))
    kernel = jnp.ones((2, 2, 2, N))
    numbers = ("NHWC", "HWIO", "NHWC")
    backwards = lambda p, kernel: (
        lax.conv_general_dilated(p["image"], kernel, (1, 1), "SAME", dimension_numbers=numbers)
        + (p["w"] @ jnp.ones((3, 1))).sum()
    )
    f = msbp.sparse_vjp(backwards, msbp.top_k(k=1), min_features=1)
    reasons = {row.name: row.reason for row in f.report({"image": image, "w": jnp.ones((64, 3))}, kernel).dense}
    assert reasons["image"] == "the parameter is the left operand of conv_general_dilated"
    transposed = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    odd = lambda p, x: lax.ragged_dot_general(x, p["w"], jnp.array([2, 1]), transposed).sum() + (x @ p["v"]).sum()
    f = msbp.sparse_vjp(odd, msbp.top_k(k=1), min_features=1)
    report = f.report({"w": jnp.ones((3, 5)), "v": jnp.ones((4, 64))}, jnp.ones((3, 4)))
    assert report.dense[0].reason == "a ragged product of another form than lax.ragged_dot's"
