"""Convolutions and ragged products on the examples that are kept: plain JAX of them, in every geometry and program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax.kernels.native import calls
from msbp_jax.testing import random_gradient

SKIP = msbp.skip_zero_rows()
NATIVE = calls.available()
NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape):
    return random_gradient(seed, 1, int(np.prod(shape)))[0].reshape(shape)


def gradients(f, params, x, mask):
    shape = lambda y: mask.reshape(-1, *(1,) * (y.ndim - 1))
    loss = lambda p, x: (jnp.sin(f(p, x)) * shape(f(p, x))).sum()
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)


def convolution(numbers=NHWC, strides=(1, 1), padding="SAME", **options):
    return lambda w, x: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


@settings(max_examples=16)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(-1, 3)] * 4),
    st.tuples(st.integers(1, 20), st.integers(1, 40)),
    st.sampled_from([("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CNHW", "IHWO", "NHWC")]),
    st.sampled_from([None, "xla"]),
    st.integers(0, 3),
)
def test_every_geometry(pixels, window, strides, dilation, pads, channels, numbers, backend, seed):
    sizes = dict(zip("NHW", pixels, strict=True), C=channels[0])
    of_kernel = dict(zip("HW", window, strict=True), I=channels[0], O=channels[1])
    x, w = (normal(seed, *[sizes[axis] for axis in numbers[0]]), normal(9, *[of_kernel[axis] for axis in numbers[1]]))
    f = convolution(numbers, strides, (pads[:2], pads[2:]), rhs_dilation=dilation)
    if 0 in jax.eval_shape(f, w, x).shape:
        return
    mask = jnp.asarray(np.random.default_rng(seed).random(pixels[0]) < 0.4, jnp.float32)
    sparse = msbp.sparse_vjp(f, SKIP, min_features=1, backend=backend)
    assert_trees_close(gradients(sparse, w, x, mask), gradients(f, w, x, mask))


def test_reports_say_what_runs():
    w, x = normal(0, 3, 3, 4, 8), normal(1, 8, 6, 6, 4)
    row = lambda f, **options: msbp.sparse_vjp(f, SKIP, min_features=1, **options).report(w, x).sparse[0]
    here = row(convolution())
    assert here.backend == ("native, images that are kept" if NATIVE else "xla, dense")
    assert here.skips == ("rows" if NATIVE else "")
    assert row(convolution(), backend="xla").backend == "xla, images that are kept, below 75% of the images"
    # A CPU's convolutions in a branch of XLA's are slow: what the kernels do not run, runs whole.
    transposed = row(convolution(padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)))
    assert transposed.backend == "xla, dense"
    said = "native kernels leave out images of plain convolutions alone on a CPU (one or two axes of pixels, four"
    assert said in transposed.warning
    asked = row(convolution(), backend="dense")
    assert asked.backend == "xla, dense"
    assert 'backend="dense" asks for it' in asked.warning
    w, x = w.astype(jnp.float16), x.astype(jnp.float16)
    assert row(convolution()).backend == "xla, dense"


def test_dense_by_native_kernels():
    """The whole gradient, to the order of sums, of convolutions that they run; all else is plain JAX."""
    x, model = normal(0, 8, 8, 8, 3), CNN()
    params = model.init(jax.random.key(0), x)
    f = msbp.sparse_vjp(model, msbp.dense(native=True))
    loss = lambda apply: lambda p: jnp.sin(apply(p, x)).sum()
    assert_trees_close(jax.jit(jax.grad(loss(f.apply)))(params), jax.jit(jax.grad(loss(model.apply)))(params))
    assert f.init_memory(params, x) == ({"Conv_0/kernel": (), "Conv_1/kernel": ()} if NATIVE else {})
    report = f.report(params, x)
    rows = {row.name: row for row in report.sparse}
    assert {name: row.backend for name, row in rows.items()} == (
        {"Conv_0/kernel": "native, all images", "Conv_1/kernel": "native, all images"} if NATIVE else {}
    )
    assert all((row.keeps, row.saved, row.skips, row.warning) == ("all", 0, "", "") for row in rows.values())
    assert {row.name for row in report.dense} >= {"Dense_0/kernel"}
    for options in ({"feature_group_count": 2}, {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}):
        w, own = normal(1, 3, 3, 4 // options.get("feature_group_count", 1), 8), convolution(**options)
        plain = msbp.sparse_vjp(own, msbp.dense(native=True)).report(w, normal(0, 8, 6, 6, 4))
        assert not plain.sparse
        assert plain.dense[0].reason == "dense(native=True) keeps all 8 features"
    with pytest.raises(TypeError, match="native must be True or False, got 1"):
        msbp.dense(native=1)


def test_groups_of_images_and_of_features_run_whole_on_a_cpu():
    w, x = normal(0, 3, 3, 2, 8), normal(1, 8, 6, 6, 4)
    mask = (jnp.arange(8) % 2).astype(jnp.float32)
    for options in ({"feature_group_count": 2}, {"batch_group_count": 2}):
        kernel = w if "feature_group_count" in options else normal(2, 3, 3, 4, 8)
        f = convolution(**options)
        sparse = msbp.sparse_vjp(f, SKIP, min_features=1)
        rows = f(kernel, x).shape[0]
        assert_trees_equal(gradients(sparse, kernel, x, mask[:rows]), gradients(f, kernel, x, mask[:rows]))
        assert sparse.report(kernel, x).sparse[0].backend == "xla, dense"
    # By name, XLA takes the kept images of a grouped convolution.
    f = convolution(feature_group_count=2)
    sparse = msbp.sparse_vjp(f, SKIP, min_features=1, backend="xla")
    assert_trees_close(gradients(sparse, w, x, mask), gradients(f, w, x, mask))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width, strides in ((16, 1), (32, 2)):
            x = nn.relu(nn.Conv(width, (3, 3), strides)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.mark.parametrize("backend", [None, "xla"])
def test_a_draw_over_images_of_a_network(backend):
    """What is drawn where the gradient enters is left out by every layer, with the same result as dense layers have."""
    x, model, direction = normal(0, 32, 8, 8, 3), CNN(), normal(1, 32, 10)
    params, found = model.init(jax.random.key(0), x), []
    drawn = msbp.sample_rows(density=0.25)
    for layers in (SKIP, msbp.dense()):
        f = msbp.sparse_vjp(model, {"@outputs": drawn, "*": layers}, backend=backend, min_features=1)
        loss = lambda p, m, f=f: (f.apply(p, x, memory=m) * direction).sum()
        _, grads, memory = jax.jit(msbp.value_and_grad(loss))(params, f.init_memory(params, x))
        assert float(msbp.metrics(memory)["@outputs/count"]) == 8
        found.append(grads)
    assert_trees_close(*found)


def test_members_of_a_vmap_steps_of_a_scan_and_remat():
    x, w, mask = normal(0, 2, 8, 6, 6, 4), normal(1, 3, 3, 4, 4), (jnp.arange(8) % 3 == 0).astype(jnp.float32)
    f = convolution()
    sparse = msbp.sparse_vjp(f, SKIP, min_features=1)
    of = lambda f: jax.vmap(lambda x: gradients(f, w, x, mask))(x)
    assert_trees_close(of(sparse), of(f))

    def stacked(w, x):
        return lax.scan(lambda h, w: (jax.checkpoint(lambda h: jnp.tanh(f(w, h)))(h), None), x, w)[0]

    stack = jnp.stack([w, w / 2])
    looped = msbp.sparse_vjp(stacked, SKIP, min_features=1)
    assert_trees_close(gradients(looped, stack, x[0], mask), gradients(stacked, stack, x[0], mask))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    w, x = normal(0, 3, 3, 4, 8).astype(dtype), normal(1, 8, 6, 6, 4).astype(dtype)
    mask = (jnp.arange(8) % 2).astype(dtype)
    sparse = msbp.sparse_vjp(convolution(), SKIP, min_features=1)
    for got, want in zip(gradients(sparse, w, x, mask), gradients(convolution(), w, x, mask), strict=True):
        assert got.dtype == want.dtype
        scale = float(jnp.abs(want.astype(jnp.float32)).max())
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.02 * scale)


@pytest.mark.parametrize("narrow", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_operands_narrower_than_the_gradient(narrow):
    w, x = normal(0, 3, 3, 4, 8).astype(narrow), normal(1, 8, 6, 6, 4).astype(narrow)
    f = convolution(preferred_element_type=jnp.float32)
    mask = (jnp.arange(8) % 2).astype(jnp.float32)
    want = gradients(f, w, x, mask)
    for sparsifier in (SKIP, msbp.dense(native=True)):
        for got, right in zip(gradients(msbp.sparse_vjp(f, sparsifier), w, x, mask), want, strict=True):
            assert got.dtype == right.dtype
            wide = right.astype(jnp.float32)
            np.testing.assert_allclose(got.astype(jnp.float32), wide, atol=0.1 * float(jnp.abs(wide).max()))


def test_rows_that_are_drawn_apart_leave_out_no_image():
    """An image of which any position is kept is computed: the report says so, and how whole ones are drawn."""
    w, x = normal(0, 3, 3, 4, 8), normal(1, 8, 6, 6, 4)
    row = lambda s, **options: msbp.sparse_vjp(convolution(), s, min_features=1, **options).report(w, x).sparse[0]
    apart = row({"params": msbp.sample_rows(density=0.25)})
    assert (apart.backend, apart.saved) == ("xla, dense", 0)
    assert "an example is computed if any of its 36 rows is kept, and 1 at a time are drawn" in apart.warning
    whole = row({"params": msbp.sample_rows(density=0.25, rows_per_group="example")})
    assert (whole.backend, whole.saved) == (("native, images that are kept", 0.75) if NATIVE else ("xla, dense", 0))
    assert "so many rows are kept that it is faster" in row({"params": msbp.sample_rows(density=0.9)}).warning
    two = msbp.sample_rows(density=0.25, rows_per_group=72)
    assert row({"params": two}, backend="xla").backend.startswith("xla, images that are kept")
    f = msbp.sparse_vjp(convolution(), {"params": msbp.sample_rows(density=0.5, rows_per_group="example")})
    plain = msbp.sparse_vjp(convolution(), {"params": msbp.sample_rows(density=0.5, rows_per_group="example")},
                            backend="dense")  # fmt: skip
    loss = lambda f: lambda w, m: jnp.sin(f(w, x, memory=m)).sum()
    got, want = (msbp.value_and_grad(loss(f))(w, f.init_memory(w, x))[1] for f in (f, plain))
    assert_trees_close(got, want)


def test_no_images_and_all_left_out():
    w, x, sparse = normal(0, 3, 3, 4, 8), normal(1, 8, 6, 6, 4), msbp.sparse_vjp(convolution(), SKIP, min_features=1)
    for leaf in jax.tree.leaves(gradients(sparse, w, x, jnp.zeros(8))):
        assert not leaf.any()
    assert_trees_equal(gradients(sparse, w, x[:0], jnp.zeros(0)), gradients(convolution(), w, x[:0], jnp.zeros(0)))


def test_nnx():
    model, x, mask = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), normal(0, 8, 6, 6, 4), jnp.arange(8.0) % 2
    loss = lambda m: (jnp.sin(m(x)) * mask[:, None, None, None]).sum()
    want = nnx.to_pure_dict(nnx.grad(loss)(model))
    sparse = msbp.sparse_vjp(model, SKIP, min_features=1)
    got = nnx.to_pure_dict(nnx.grad(loss)(sparse))
    assert_trees_close(jax.tree.leaves(got), jax.tree.leaves(want))


def experts(w, x, sizes):
    return lax.ragged_dot(x, w, sizes)


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0]),
    st.integers(0, 5),
)
def test_experts_of_a_ragged_product(sizes, more, share, seed):
    """Group sizes are counted again; rows that are no expert's stay so."""
    rows = sum(sizes) + more
    if not rows:
        return
    x, w, sizes = normal(seed, rows, 5), normal(seed + 1, len(sizes), 5, 7), jnp.asarray(sizes, jnp.int32)
    mask = jnp.asarray(np.random.default_rng(seed).random(rows) < share, jnp.float32)
    plain, f = (lambda w, x: experts(w, x, sizes)), msbp.sparse_vjp(experts, SKIP, min_features=1)
    assert_trees_close(gradients(lambda w, x: f(w, x, sizes), w, x, mask), gradients(plain, w, x, mask))
    assert f.report(w, x, sizes).sparse[0].backend == "xla, rows that are kept, below 75% of the rows"


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("backend", [None, "xla"])
@pytest.mark.parametrize("axis", ["images", "features"])
def test_images_stay_on_their_devices(backend, axis):
    """Each device computes its own images, or features, and what must be added up is; nothing is gathered."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x, mask = normal(0, 3, 3, 4, 8), normal(1, 32, 6, 6, 4), (jnp.arange(32) % 3 == 0).astype(jnp.float32)
    f = msbp.sparse_vjp(convolution(), SKIP, min_features=1, backend=backend)
    loss = lambda w, x, mask: (jnp.sin(f(w, x)) * mask[:, None, None, None]).sum()
    put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    by_images = axis == "images"
    placed = (w, put(x, "d"), put(mask, "d")) if by_images else (put(w, None, None, None, "d"), put(x), put(mask))
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert_trees_close(step(*placed), gradients(convolution(), w, x, mask))
    if NATIVE or backend:
        text = step.lower(*placed).compile().as_text()
        assert "all-gather" not in text
        assert "all-reduce" in text


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_experts_over_devices():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, sizes, mask = (
        normal(0, 64, 8),
        normal(1, 4, 8, 16),
        jnp.array([10, 0, 30, 14]),
        (jnp.arange(64) % 4 == 0).astype(jnp.float32),
    )
    plain, f = (lambda w, x: experts(w, x, sizes)), msbp.sparse_vjp(experts, SKIP, min_features=1)
    want = gradients(plain, w, x, mask)
    for spec in (("d",), (None, "d")):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert_trees_close(gradients(lambda w, x: f(w, x, sizes), w, placed, mask), want)
