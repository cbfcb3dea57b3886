"""Models whose convolutions have sparse kernels: the dense ones with zeros, in every geometry and program."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import msbp_jax as msbp
from msbp_jax.kernels import convolutions
from msbp_jax.kernels import weights as kernels
from msbp_jax.testing import random_gradient

NATIVE = kernels.native_is_available()


def normal(seed, *shape):
    return random_gradient(seed, 1, int(np.prod(shape)))[0].reshape(shape)


def close(got, want):
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want)) + 1e-30
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=3e-5 * scale), got, want)


def plain(**options):
    """Return a convolution of one step, channels last."""
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    return lambda p, x: lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", **numbers)


def check(f, params, x, include=("*kernel",), axes=3, density=0.3, native=True):
    """The sparse function is the dense one of masked weights, forward and backward, of inputs and weights."""
    sparse = msbp.prune(
        {"params": params}, density=density, include=list(include), input_axes=dict.fromkeys(include, axes)
    )
    dense, model = msbp.densify(sparse), msbp.sparse_weights(f)
    loss = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x)))
    run = lambda p, x: model(p, sparse["sparsity"], x)
    differentiate = lambda f: jax.jit(jax.value_and_grad(loss(f), argnums=(0, 1)))
    value, (of_params, of_x) = differentiate(run)(sparse["params"], x)
    want, (dense_params, dense_x) = differentiate(f)(dense["params"], x)
    mask = msbp.densify({**sparse, "params": jax.tree.map(np.ones_like, sparse["params"])})["params"]
    close(value, want)
    close(of_x, dense_x)
    close(
        msbp.densify({**sparse, "params": of_params})["params"],
        jax.tree.map(lambda g, m: np.where(np.asarray(m) != 0, g, 0), dense_params, mask),
    )
    if native:
        rows = rows_of(model, sparse, x)
        assert all(row.products and not row.warning.count("sees the dense") for row in rows)
        assert not NATIVE or density > 0.3 or {row.backend for row in rows} == {"native"}
    return model, sparse


def rows_of(model, sparse, x):
    return model.report(sparse["params"], sparse["sparsity"], x).weights


@settings(max_examples=24)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 14), st.integers(1, 14)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(-1, 3)] * 4),
    st.integers(1, 3),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from(["NHWC", "NCHW", "CNHW"]),
    st.sampled_from([0.05, 0.3, 0.5]),
    st.integers(0, 3),
)
def test_every_geometry(pixels, window, strides, dilation, pads, groups, channels, layout, density, seed):
    padding = (pads[:2], pads[2:])
    shape = [dict(zip("NHW", pixels, strict=True), C=groups * channels[0])[axis] for axis in layout]
    x, w = normal(seed, *shape), normal(seed + 1, *window, channels[0], groups * channels[1])

    def f(params, x):
        return lax.conv_general_dilated(
            x, params["kernel"], strides, padding, rhs_dilation=dilation, feature_group_count=groups,
            dimension_numbers=(layout, "HWIO", layout),
        )  # fmt: skip

    try:
        out = jax.eval_shape(f, {"kernel": w}, x)
    except (ValueError, TypeError):  # padding cuts off more than there is
        return
    if 0 in out.shape or round(density * w.size) < 1:
        return
    check(f, {"kernel": w}, x, density=density)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "CAUSAL"])
def test_one_axis_of_pixels(padding):
    module = nn.Conv(6, (3,), strides=1 if padding == "CAUSAL" else 2, padding=padding)
    x = normal(0, 3, 12, 4)
    params = module.init(jax.random.key(0), x)["params"]
    check(lambda p, x: module.apply({"params": p}, x), params, x, axes=2)


class CNN(nn.Module):
    """Norms, a residual connection, strides and groups."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        conv = nn.remat(nn.Conv) if self.remat else nn.Conv
        x = nn.relu(nn.GroupNorm(2)(conv(8, (3, 3), name="first")(x)))
        x = nn.relu(x + conv(8, (3, 3), feature_group_count=2, name="second")(x))
        return nn.Dense(5)(conv(12, (1, 1), strides=2, name="third")(x).mean((1, 2)))


X = normal(0, 8, 6, 6, 3)
PARAMS = jax.jit(CNN().init)(jax.random.key(0), X)["params"]
WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda f: lambda p, x: lax.cond(x.sum() > -1e9, f, lambda p, x: 0 * f(p, x), p, x),
    "vmap": lambda f: lambda p, x: jax.vmap(f, in_axes=(None, 0))(p, x.reshape(4, 2, *x.shape[1:])),
    "scan over time": lambda f: lambda p, x: lax.scan(lambda c, x: (c, f(p, x[None])), 0.0, x)[1],
}


@pytest.mark.parametrize("name", WRAPS)
def test_within(name):
    """Inside of the transformation, with a module whose layers are rematerialised, too."""
    module = CNN(remat=name == "jit")
    f = WRAPS[name](lambda p, x: module.apply({"params": p}, x))
    check(f, PARAMS, X, include=("*d/kernel", "first/kernel"))


def test_bits_of_plain_jax_by_xla():
    f = lambda p, x: CNN().apply({"params": p}, x)
    sparse = msbp.prune({"params": PARAMS}, density=0.4, include=["second/kernel"], input_axes={"second/*": 3})
    dense, model = msbp.densify(sparse), msbp.sparse_weights(f, backend="xla")
    run = lambda p, x: model(p, sparse["sparsity"], x).sum()
    value, grads = jax.value_and_grad(run)(sparse["params"], X)
    want, of_dense = jax.value_and_grad(lambda p, x: f(p, x).sum())(dense["params"], X)
    assert value == want
    masks = {"second": {"kernel": sparse["sparsity"]["second"]["kernel"].mask()}}
    taken = msbp.prune({"params": of_dense}, masks=masks, input_axes={"second/*": 3})
    jax.tree.map(np.testing.assert_array_equal, grads, taken["params"])


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.tanh(nn.Conv(x.shape[-1], (3, 3))(x)), None

        return nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(
            x, None
        )[0]


def test_a_scan_over_layers():
    """A pattern each; entries are as many, whatever is kept of each layer."""
    x = normal(0, 2, 5, 5, 4)
    variables = Stack().init(jax.random.key(0), x)
    sparse = msbp.prune(
        variables, density=0.2, include=["*kernel"], input_axes={"*kernel": 3}, stacked=["layers/*"], scope="global"
    )
    model, dense = msbp.sparse_weights(Stack()), msbp.densify(sparse)
    loss = lambda f: lambda v: (f(v) ** 2).sum()
    got = jax.grad(lambda p: loss(lambda p: model.apply({**sparse, "params": p}, x))(p))(sparse["params"])
    want = jax.grad(lambda p: loss(lambda p: Stack().apply({"params": p}, x))(p))(dense["params"])
    kept = sparse["sparsity"]["layers"]["Conv_0"]["kernel"].mask()
    found = msbp.densify({**sparse, "params": got})["params"]["layers"]["Conv_0"]["kernel"]
    close(found, jnp.where(kept, want["layers"]["Conv_0"]["kernel"], 0))
    assert model.report(sparse, x).weights[0].products == 1


def test_an_nnx_model_and_what_trains_it():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.conv(x)).mean((1, 2)))

    plain, model = Net(nnx.Rngs(0)), msbp.sparse_weights(Net(nnx.Rngs(0)))
    model.prune(density=0.25, include=["conv/kernel"], input_axes={"conv/*": 3})
    copy = nnx.clone(model)
    copy.densify()
    plain.conv.kernel[...] = copy.module.conv.kernel[...]
    close(model(X), plain(X))
    loss = lambda model: (model(X) ** 2).mean()
    (got,) = [leaf for leaf in jax.tree.leaves(nnx.grad(loss)(model)) if leaf.shape == (54,)]
    want = nnx.grad(loss)(plain)["conv"]["kernel"][...]
    kept = want[plain.conv.kernel[...] != 0]
    close(jnp.sort(got), jnp.sort(kept))


SPARSIFIERS = {
    "top_k": msbp.top_k(density=0.5, rows_per_group=None),
    "rows": msbp.sample_rows(density=0.5),
    "memory": msbp.memorized(msbp.top_k(density=0.5, rows_per_group=4), decay=0.5),
}


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_with_a_sparse_gradient(name):
    """What is propagated is what a dense kernel with zeros would see."""
    plan = {"first/kernel": msbp.dense(), "Dense_0/kernel": msbp.dense(), "*": SPARSIFIERS[name]}
    inner = msbp.sparse_vjp(CNN(), plan, min_features=1)
    sparse = msbp.prune(
        {"params": PARAMS}, density=0.3, include=["third/kernel", "second/kernel"], input_axes={"*kernel": 3}
    )
    model, dense = msbp.sparse_weights(inner), msbp.densify(sparse)
    options = {}
    if memory := model.init_memory(sparse, X):
        options = {"memory": memory}
    loss = lambda model, variables: (
        lambda p, *memory: jnp.sum(
            jnp.sin(model.apply({**variables, "params": p}, X, **({"memory": memory[0]} if memory else {})))
        )
    )
    differentiate = msbp.value_and_grad if options else jax.value_and_grad
    got = jax.jit(differentiate(loss(model, sparse)))(sparse["params"], *options.values())
    want = jax.jit(differentiate(loss(inner, dense)))(dense["params"], *options.values())
    close(got[0], want[0])
    kept = msbp.densify({**sparse, "params": jax.tree.map(jnp.ones_like, sparse["params"])})["params"]
    masked = jax.tree.map(lambda g, m: jnp.where(m != 0, g, 0), want[1], kept)
    close(msbp.densify({**sparse, "params": got[1]})["params"], masked)


@pytest.mark.parametrize("backend", [None, "xla"])
@pytest.mark.parametrize("images", [16, 12])
def test_images_on_eight_devices(backend, images):
    """Images stay where they are, and dw is added up; within shard_map, too. Some numbers do not divide by eight."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sparse = msbp.prune({"params": PARAMS}, density=0.3, include=["second/kernel"], input_axes={"second/*": 3})
    model, x = msbp.sparse_weights(CNN(), backend=backend), normal(1, images, 6, 6, 3)
    loss = lambda p, s, x: jnp.sum(jnp.sin(model.apply({"params": p, "sparsity": s}, x)))
    want = jax.jit(jax.grad(loss))(sparse["params"], sparse["sparsity"], x)
    whole, split = PartitionSpec(), PartitionSpec("d")
    held = jax.device_put(sparse, NamedSharding(mesh, whole))
    placed = jax.device_put(x, NamedSharding(mesh, split if images == 16 else whole))
    compiled = jax.jit(jax.grad(loss)).lower(held["params"], held["sparsity"], placed).compile()
    close(jax.device_get(compiled(held["params"], held["sparsity"], placed)), want)
    if backend is None and NATIVE:  # a grouped convolution of XLA's gathers, dense as well
        assert " all-gather(" not in compiled.as_text()
    if images == 16:
        mapped = jax.shard_map(
            lambda p, s, x: lax.psum(loss(p, s, x), "d"), mesh=mesh, in_specs=(whole, whole, split), out_specs=whole
        )
        close(jax.device_get(jax.jit(jax.grad(mapped))(sparse["params"], sparse["sparsity"], x)), want)


def test_images_on_an_explicit_mesh():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    f = plain()
    x, w = normal(1, 16, 6, 6, 3), normal(2, 3, 3, 3, 8)
    sparse = msbp.prune({"params": {"kernel": w}}, density=0.3, include=["kernel"], input_axes={"kernel": 3})
    model = msbp.sparse_weights(f)
    loss = lambda p, s, x: jnp.sum(jnp.sin(model(p, s, x)))
    want = jax.grad(loss)(sparse["params"], sparse["sparsity"], x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
        held = jax.device_put(sparse, NamedSharding(mesh, PartitionSpec()))
        got = jax.jit(jax.grad(loss))(held["params"], held["sparsity"], placed)
    close(jax.device_get(got), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_another_dtype(dtype):
    """A float32 result of narrow operands does not go through the narrow dtype: 4096 times 16 times 16 is 2^20."""
    f = plain(preferred_element_type=jnp.float32)
    x, w = jnp.full((1, 2, 2, 4096), 16, dtype), jnp.full((1, 1, 4096, 3), 16, dtype)
    mask = jnp.arange(4096 * 3).reshape(w.shape) > 2
    for backend in (None, "xla"):
        sparse = msbp.prune({"params": {"kernel": w}}, masks={"kernel": mask}, input_axes={"kernel": 3})
        model = msbp.sparse_weights(f, backend=backend)
        y = model(sparse["params"], sparse["sparsity"], x)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, np.full(y.shape, 4095 * 256))
        grads = jax.grad(lambda p, model=model, s=sparse: model(p, s["sparsity"], x).sum())(sparse["params"])
        assert grads["kernel"].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(grads["kernel"].astype(jnp.float32), np.full(4095 * 3, 64.0))


def test_export_and_second_derivatives_by_xla():
    f = lambda p, x: CNN().apply({"params": p}, x)
    sparse = msbp.prune({"params": PARAMS}, density=0.3, include=["second/kernel"], input_axes={"second/*": 3})
    model, dense = msbp.sparse_weights(f, backend="xla"), msbp.densify(sparse)
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (sparse["params"], sparse["sparsity"])
    )
    exported = jax.export.export(jax.jit(model))(*shapes, jax.ShapeDtypeStruct((b, 6, 6, 3), jnp.float32))
    close(exported.call(sparse["params"], sparse["sparsity"], X), f(dense["params"], X))
    norm = lambda f: lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x) ** 2)
    got = jax.jit(jax.grad(norm(lambda x: model(sparse["params"], sparse["sparsity"], x))))(X)
    close(got, jax.jit(jax.grad(norm(lambda x: f(dense["params"], x))))(X))


@pytest.mark.parametrize(
    ("f", "shape", "axes", "reason"),
    [
        (lambda p, x: lax.conv_transpose(x, p["kernel"], (2, 2), "SAME"), (3, 3, 3, 4), 3, "a transposed convolution"),
        (lambda p, x: lax.conv(x, p["kernel"], (1, 1), "SAME"), (4, 6, 3, 3), 3, "another order of axes"),
        (plain(), (3, 3, 3, 4), 2, "input_axes= of prune must say that all axes but the last are inputs, 3 here"),
        (plain(batch_group_count=2), (3, 3, 3, 4), 3, "groups of images"),
        (lambda p, x: lax.conv_general_dilated(x[..., None], p["kernel"], (1,) * 3, "SAME",
                                               dimension_numbers=("NHWDC", "HWDIO", "NHWDC")), (2, 2, 2, 1, 4), 4,
         "more than two axes of pixels"),
    ],
    ids=["transposed", "OIHW", "axes", "groups of images", "three axes of pixels"],
)  # fmt: skip
def test_others_see_the_dense_kernel_and_the_report_says_so(f, shape, axes, reason):
    x = normal(0, 2, 6, 6, 3)
    model, sparse = check(f, {"kernel": normal(1, *shape)}, x, axes=axes, native=False)
    (row,) = rows_of(model, sparse, x)
    assert row.warning.startswith("conv_general_dilated (")
    assert reason in row.warning
    assert row.warning.endswith(") sees the dense weight; no product with it is sparse")


def test_the_report_names_the_backend_and_what_is_slower():
    f = lambda p, x: nn.Conv(8, (3, 3)).apply({"params": p}, x)
    x = normal(0, 2, 6, 6, 128)
    params = nn.Conv(8, (3, 3)).init(jax.random.key(0), x)["params"]
    report = {}
    for density in (0.1, 0.32, 0.6):
        sparse = msbp.prune({"params": params}, density=density, include=["kernel"], input_axes={"kernel": 3})
        (report[density],) = rows_of(msbp.sparse_weights(f), sparse, x)
    assert report[0.1].backend == ("native" if NATIVE else "xla, dense")
    assert report[0.1].warning == "" or not NATIVE
    for density in (0.32, 0.6):
        assert report[density].backend == "xla, dense"
        assert ("lists are slower still above 30% of the entries" in report[density].warning) == NATIVE
    sparse = msbp.prune({"params": params}, density=0.32, include=["kernel"], input_axes={"kernel": 3})
    (named,) = rows_of(msbp.sparse_weights(f, backend="native"), sparse, x)
    assert "probably slower than with a dense weight, as they are above 30% of the entries" in named.warning


def test_the_break_even_holds_on_the_grid_that_was_measured():
    """Up to it, lists were no slower than the better of two dense forms, at all layers of the benchmark."""
    file = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "parts" / "sparse_conv.json"
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) >= 50
    for row in rows:
        inputs = row["window"] ** 2 * row["channels_in"]
        pattern = msbp.Pattern(*[jax.ShapeDtypeStruct((1,), jnp.int32)] * 5, shape=(inputs, 1))
        if 1 - row["zeros, %"] / 100 <= convolutions.break_even(pattern) + 1e-9:
            assert row["better dense/sparse"] >= 0.98, row
