"""Sparse weights: the twin is the dense model with a mask, for every program around the product."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import msbp_jax as msbp
from msbp_jax.kernels import weights as kernels
from msbp_jax.testing import random_gradient

KEY = jax.random.key(0)
SHARP = functools.partial(jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4))


class MLP(nn.Module):
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(48, dtype=self.dtype)(x))
        return nn.Dense(24, dtype=self.dtype)(x)


def twins(module, x, density=0.15, **options):
    """Return the sparse model and its variables, and the dense variables."""
    sparse = msbp.prune(jax.jit(module.init)(jax.random.key(1), x), density=density, **options)
    return msbp.sparse_weights(module), sparse, msbp.densify(sparse)


def masked(sparse, gradients):
    """Return a dense model's gradients with zeros where the sparse one has no entries."""
    ones = msbp.densify({**sparse, "params": jax.tree.map(np.ones_like, sparse["params"])})["params"]
    return jax.tree.map(np.multiply, gradients, ones)


def check(model, sparse, module, dense, x, wrap=lambda f: f):
    """Compare result and gradients with those of the dense twin."""
    of_sparse = wrap(lambda p, x: model.apply({**sparse, "params": p}, x))
    of_dense = wrap(lambda p, x: module.apply({**dense, "params": p}, x))
    SHARP(jax.jit(of_sparse)(sparse["params"], x), jax.jit(of_dense)(dense["params"], x))
    loss = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x).astype(jnp.float32)))
    dp, dx = jax.jit(jax.grad(loss(of_sparse), (0, 1)))(sparse["params"], x)
    want_dp, want_dx = jax.jit(jax.grad(loss(of_dense), (0, 1)))(dense["params"], x)
    SHARP(msbp.densify({**sparse, "params": dp})["params"], masked(sparse, want_dp))
    SHARP(dx, want_dx)


@pytest.mark.parametrize("density", [0.02, 0.15, 0.6])
def test_an_mlp(density):
    x = random_gradient(0, 37, 32)
    model, sparse, dense = twins(MLP(), x, density)
    check(model, sparse, MLP(), dense, x)


@settings(max_examples=20)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0.02, 0.9),
    st.sampled_from(["x w", "x wT", "w x", "wT xT", "three axes"]),
    st.integers(0, 3),
)
def test_every_way_to_multiply(rows, m, n, share, way, seed):
    mask = np.random.default_rng(seed).random((m, n)) < share
    mask[seed % m, seed % n] = True
    w, x = random_gradient(seed, m, n), random_gradient(seed + 9, rows, n if way in ("x wT", "w x") else m)
    f = {
        "x w": lambda w, x: x @ w,
        "x wT": lambda w, x: x @ w.T,
        "w x": lambda w, x: w @ x.T,
        "wT xT": lambda w, x: w.T @ x.T,
        "three axes": lambda w, x: jnp.einsum("abm,mn->nab", x[:, None], w),
    }[way]
    sparse = msbp.prune({"params": w}, masks=mask)
    if mask.all():
        return
    g = msbp.sparse_weights(f)
    of_sparse = lambda w, x: jnp.sum(jnp.sin(g(w, sparse["sparsity"], x)))
    dw, dx = jax.jit(jax.grad(of_sparse, (0, 1)))(sparse["params"], x)
    of_dense = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(f(w, x))), (0, 1)))
    want_dw, want_dx = of_dense(np.where(mask, w, 0), x)
    SHARP(msbp.densify({**sparse, "params": dw})["params"], np.where(mask, want_dw, 0))
    SHARP(dx, want_dx)


@pytest.mark.parametrize("backend", ["native", "unpacked", "xla"])
@pytest.mark.parametrize("turned", [False, True])
def test_backends_against_float64(backend, turned):
    if backend != "xla" and "native" not in msbp.backends()["select"]:
        pytest.skip("the native kernels were not built")
    w, x, g = random_gradient(0, 33, 50), random_gradient(1, 21, 50 if turned else 33), random_gradient(2, 21, 50)
    sparse = msbp.prune({"params": {"w": w}}, density=0.2, include=["w"])
    pattern, dense = sparse["sparsity"]["w"], np.asarray(msbp.densify(sparse)["params"]["w"], np.float64)
    y = kernels.times(x, sparse["params"]["w"], pattern, turned, backend=backend)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ (dense.T if turned else dense), rtol=1e-4, atol=1e-5)
    if not turned:
        dw = kernels.gradient(x, g, pattern, backend=backend)
        whole = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
        want = np.where(pattern.mask(), whole, 0)
        np.testing.assert_allclose(
            msbp.densify({**sparse, "params": {"w": dw}})["params"]["w"], want, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("block", [(8, 8), (4, 16)])
def test_tiles_against_float64(block, stacked):
    """Patterns of blocks, padded ones too, as accelerators take them."""
    w = random_gradient(0, 2 * 32, 48).reshape(2, 32, 48)
    keep = np.random.default_rng(1).random((2, 32 // block[0], 48 // block[1])) < 0.3
    keep[1, 1:] = False
    keep[:, 0, 0] = True
    mask = keep.repeat(block[0], 1).repeat(block[1], 2)
    sparse = msbp.prune({"params": {"w": w}}, masks={"w": mask}, stacked=["w"], block=block)
    for layer in (0, 1):
        pattern = jax.tree.map(lambda leaf, layer=layer: leaf[layer], sparse["sparsity"]["w"])
        values, dense = sparse["params"]["w"][layer], np.where(mask, w, 0)[layer].astype(np.float64)
        x, g = random_gradient(2, 7, 32), random_gradient(3, 7, 48)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        close(kernels.times(x, values, pattern, False, backend="tiles"), np.asarray(x, np.float64) @ dense)
        close(kernels.times(g, values, pattern, True, backend="tiles"), np.asarray(g, np.float64) @ dense.T)
        dw = kernels.gradient(x, g, pattern, backend="tiles")
        close(dw, kernels.gradient(x, g, pattern, backend="xla"))
    if not stacked:
        return
    card = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
        f = msbp.sparse_weights(lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1])
        (row,) = f.report(sparse["params"], sparse["sparsity"], x).weights
    assert row.backend == ("xla, tiles" if min(block) >= 8 else "xla, dense")


def test_bfloat16():
    x = random_gradient(0, 30, 32)
    model, sparse, dense = twins(MLP(jnp.bfloat16), x)
    assert model.apply(sparse, x).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        model.apply(sparse, x).astype(jnp.float32), MLP(jnp.bfloat16).apply(dense, x).astype(jnp.float32), atol=0.03
    )
    halved = {**sparse, "params": jax.tree.map(lambda p: p.astype(jnp.bfloat16), sparse["params"])}
    grads = jax.grad(lambda p: model.apply({**halved, "params": p}, x).astype(jnp.float32).sum())(halved["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


WRAPS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: jax.vmap(f, in_axes=(None, 0)),
    "cond": lambda f: lambda p, x: jax.lax.cond(x.sum() > -1e9, f, lambda p, x: 0 * f(p, x), p, x),
    "scan over time": lambda f: lambda p, x: jax.lax.scan(lambda c, x: (c, f(p, x)), 0.0, x)[1],
}


@pytest.mark.parametrize("name", WRAPS)
def test_within(name):
    """The transformation outside, and inside of it."""
    x = random_gradient(0, 20, 32)
    x = x.reshape(4, 5, 32) if name in ("vmap", "scan over time") else x
    model, sparse, dense = twins(MLP(), x[0] if x.ndim == 3 else x)
    check(model, sparse, MLP(), dense, x, WRAPS[name])
    inner = WRAPS[name](lambda p, x: MLP().apply({"params": p}, x))
    f = msbp.sparse_weights(inner)

    def found(f):
        """Return the result, and the gradient of a loss, compiled at once."""
        return jax.jit(lambda p: (f(p), jax.grad(lambda p: jnp.sum(jnp.cos(f(p))))(p)))

    y, got = found(lambda p: f(p, sparse["sparsity"], x))(sparse["params"])
    want_y, want = found(lambda p: inner(p, x))(dense["params"])
    SHARP(y, want_y)
    SHARP(msbp.densify({**sparse, "params": got})["params"], masked(sparse, want))
    rows = f.report(sparse["params"], sparse["sparsity"], x).weights
    assert all(row.products and "sees the dense" not in row.warning for row in rows)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(x.shape[-1])(x)), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(
            x, None
        )[0]


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers(remat):
    x = random_gradient(0, 12, 20)
    model, sparse, dense = twins(Stack(remat), x, 0.2, stacked=["layers/*/kernel"])
    assert sparse["params"]["layers"]["Dense_0"]["kernel"].shape == (3, 80)
    check(model, sparse, Stack(remat), dense, x)
    (row,) = model.report(sparse, x).weights
    assert (row.products, row.shape) == (1, (3, 20, 20))


def test_attention_with_weights_of_three_axes():
    module, x = nn.MultiHeadDotProductAttention(4), random_gradient(0, 10, 32).reshape(2, 5, 32)
    axes = {"out/kernel": 2, "*/kernel": 1}
    model, sparse, dense = twins(module, x, 0.2, input_axes=axes)
    assert all(leaf["kernel"].ndim == 1 for leaf in sparse["params"].values())
    check(model, sparse, module, dense, x)
    assert [row.products for row in model.report(sparse, x).weights] == [1, 1, 1, 1]


def test_other_uses_see_the_dense_weight():
    """Their gradient is that of the entries, and the report says so."""
    w, x = random_gradient(0, 12, 30), random_gradient(1, 5, 12)
    f = lambda w, x: (x @ w).sum() + (jnp.abs(w) ** 1.5).sum() + (w[:, :4] ** 2).sum()
    sparse = msbp.prune({"params": w}, density=0.1, include=["params"])
    g = msbp.sparse_weights(f)
    dense = msbp.densify(sparse)["params"]
    SHARP(g(sparse["params"], sparse["sparsity"], x), f(dense, x))
    got = jax.grad(g)(sparse["params"], sparse["sparsity"], x)
    want = jnp.where(dense != 0, jax.grad(f)(dense, x), 0)
    SHARP(msbp.densify({**sparse, "params": got})["params"], want)
    report = g.report(sparse["params"], sparse["sparsity"], x)
    assert "abs and slice sees the dense weight" in report.weights[0].warning
    assert "Sparse weights, forward and backward" in str(report)


def test_the_report_says_where_a_dense_weight_is_faster():
    x = random_gradient(0, 20, 32)
    for density, words in (
        (0.8, "leave it dense"),
        (0.6, "leave it dense"),
        (0.1, ""),
    ):
        model, sparse, _ = twins(MLP(), x, density)
        row = model.report(sparse, x).weights[0]
        native = density < 0.12 and kernels.native_is_available()
        assert row.backend == ("native" if native else "xla, dense")
        if kernels.native_is_available():
            assert (words in row.warning) if words else not row.warning


SPARSIFIERS = {
    "top-k, memorized": msbp.memorized(msbp.top_k(density=0.25, rows_per_group=4), decay=0.5),
    "rows": msbp.sample_rows(density=0.5),
    "dithered": msbp.dithered(2),
    "norms": msbp.sample_rows(density=0.5, scores="product"),
}


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_with_a_sparse_gradient(name):
    """`sparse_weights(sparse_vjp(...))`: the sparse twin with dense weights, masked."""
    x, plan = random_gradient(0, 16, 32), SPARSIFIERS[name]
    sparse = msbp.prune(MLP().init(jax.random.key(1), x), density=0.15)
    dense = msbp.densify(sparse)
    wrapped = msbp.sparse_vjp(MLP(), {"Dense_*": plan}, min_features=1)
    model = msbp.sparse_weights(wrapped)
    memories = model.init_memory(sparse, x), wrapped.init_memory(dense, x)
    assert jax.tree.structure(memories[0]) == jax.tree.structure(memories[1])
    for _ in range(2):
        found, both = [], zip((model, wrapped), (sparse, dense), memories, strict=True)
        for of, variables, memory in both:
            loss = lambda p, memory, of=of, v=variables: jnp.sum(
                jnp.sin(of.apply({**v, "params": p}, x, memory=memory))
            )
            found.append(jax.jit(msbp.value_and_grad(loss))(variables["params"], memory))
        (value, grads, memory), (want_value, want, want_memory) = found
        SHARP(value, want_value)
        SHARP(msbp.densify({**sparse, "params": grads})["params"], masked(sparse, want))
        numbers = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        SHARP(numbers(memory), numbers(want_memory))
        memories = memory, want_memory
    assert "its weight is sparse" in model.report(sparse, x).sparse[0].warning
    assert model.apply(sparse, x).shape == (16, 24)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_data_on_eight_devices():
    """Rows stay where they are, and dw is added up."""
    x = random_gradient(0, 64, 32)
    model, sparse, dense = twins(MLP(), x)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    held = jax.device_put(sparse, NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(jax.grad(lambda p, s, x: jnp.sum(jnp.sin(model.apply({"params": p, "sparsity": s}, x)))))
    compiled = step.lower(held["params"], held["sparsity"], placed).compile()
    want = jax.grad(lambda p: jnp.sum(jnp.sin(MLP().apply({"params": p}, x))))(dense["params"])
    got = compiled(held["params"], held["sparsity"], placed)
    SHARP(msbp.densify({**sparse, "params": jax.device_get(got)})["params"], masked(sparse, want))
    assert " all-gather(" not in compiled.as_text()

    def body(p, s, x):
        return jax.lax.psum(model.apply({"params": p, "sparsity": s}, x).sum(), "d")

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("d")),
                           out_specs=PartitionSpec())  # fmt: skip
    if kernels.native_is_available():
        lowered = jax.jit(jax.grad(mapped)).lower(sparse["params"], sparse["sparsity"], x).as_text()
        assert lowered.count("msbp_weight_times") >= 2
    got = jax.jit(jax.grad(mapped))(sparse["params"], sparse["sparsity"], x)
    want = jax.grad(lambda p: MLP().apply({"params": p}, x).sum())(dense["params"])
    SHARP(msbp.densify({**sparse, "params": jax.device_get(got)})["params"], masked(sparse, want))


def test_training_with_optax_and_checkpoints(tmp_path):
    """State as large as the entries; a step never compiles twice; Orbax and Flax write and read it all."""
    x, y = random_gradient(0, 64, 32), jnp.arange(64) % 24
    model, sparse, _ = twins(MLP(), x, 0.1)
    tx = optax.adamw(1e-2)
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    state = tx.init(sparse["params"])
    assert sizes(state) < 0.25 * sizes(tx.init(msbp.densify(sparse)["params"]))

    @jax.jit
    def step(params, sparsity, state, x, y):
        def loss(params):
            logits = model.apply({"params": params, "sparsity": sparsity}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, losses = sparse["params"], []
    with jax.numpy_dtype_promotion("standard"):  # as Optax has it
        for _ in range(30):
            params, state, value = step(params, sparse["sparsity"], state, x, y)
            losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == 1
    trained = {"params": params, "sparsity": sparse["sparsity"]}
    blank = jax.tree.map(jnp.zeros_like, trained)
    read = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(trained))
    jax.tree.map(np.testing.assert_array_equal, read, trained)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at", trained)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "at", jax.tree.map(ocp.utils.to_shape_dtype_struct, trained))
    jax.tree.map(np.testing.assert_array_equal, read, trained)
    SHARP(model.apply(read, x), model.apply(trained, x))


def test_not_a_number_stays_where_it_is():
    """A weight's reaches its own feature; an input's its own row, as in dense products but for weights of 0."""
    x = random_gradient(0, 9, 32)
    model, sparse, _ = twins(nn.Dense(40, use_bias=False), x, 0.2)
    values = sparse["params"]["kernel"]
    feature = int(sparse["sparsity"]["kernel"].features_by_entry()[0])
    y = model.apply({**sparse, "params": {"kernel": values.at[0].set(jnp.nan)}}, x)
    assert np.isnan(y).all(axis=0).nonzero()[0].tolist() == [feature]
    y = model.apply(sparse, x.at[3].set(jnp.nan))
    assert np.isnan(y).any(axis=1).nonzero()[0].tolist() == [3]


def test_empty_rows_and_columns_and_zeros():
    mask = np.zeros((8, 6), bool)
    mask[2, 1] = mask[5, 1] = mask[5, 4] = True
    sparse = msbp.prune({"params": jnp.zeros((8, 6))}, masks=mask)
    f = msbp.sparse_weights(lambda w, x: x @ w)
    x = random_gradient(0, 3, 8)
    np.testing.assert_array_equal(f(sparse["params"], sparse["sparsity"], x), np.zeros((3, 6)))
    got = jax.grad(lambda w: f(w, sparse["sparsity"], x).sum())(sparse["params"])
    SHARP(msbp.densify({**sparse, "params": got})["params"], jnp.where(mask, x.sum(0)[:, None], 0))
    none = f(sparse["params"], sparse["sparsity"], x[:0])
    assert none.shape == (0, 6)


def test_a_memory_among_the_parameters():
    x = random_gradient(0, 16, 32)
    sparse = msbp.prune(MLP().init(jax.random.key(1), x), density=0.15)
    plan = msbp.memorized(msbp.top_k(k=6, rows_per_group=4), decay=0.5)
    model = msbp.sparse_weights(msbp.sparse_vjp(MLP(), plan, min_features=1))
    params = model.with_memory(sparse, x)
    assert params["params"] is sparse["params"]
    loss = lambda params: jnp.sum(jnp.sin(model.apply({"params": params, "sparsity": sparse["sparsity"]}, x)))
    grads = jax.grad(loss)(params)
    memory = model.init_memory(sparse, x)
    want = msbp.value_and_grad(
        lambda p, memory: jnp.sum(jnp.sin(model.apply({**sparse, "params": p}, x, memory=memory)))
    )(sparse["params"], memory)
    SHARP(grads["params"], want[1])


def test_gradients_of_each_device():
    """Parameters that differ between devices by their type."""
    x = random_gradient(0, 64, 32)
    model, sparse, dense = twins(MLP(), x)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(p, s, x):
        own = jax.lax.pcast(p, "d", to="varying")
        grads = jax.grad(lambda p: model.apply({"params": p, "sparsity": s}, x).sum())(own)
        return jax.lax.pmean(grads, "d")

    whole, split = PartitionSpec(), PartitionSpec("d")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole)
    got = jax.device_get(jax.jit(mapped)(sparse["params"], sparse["sparsity"], x))
    want = jax.grad(lambda p: MLP().apply({"params": p}, x).sum() / 8)(dense["params"])
    SHARP(msbp.densify({**sparse, "params": got})["params"], masked(sparse, want))


def test_export_and_second_derivatives_by_xla():
    x = random_gradient(0, 6, 32)
    sparse = msbp.prune(MLP().init(jax.random.key(1), x), density=0.15)
    model = msbp.sparse_weights(MLP(), backend="xla")
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (sparse["params"], sparse["sparsity"])
    )
    apply = lambda p, s, x: model.apply({"params": p, "sparsity": s}, x)
    exported = jax.export.export(jax.jit(apply))(*shapes, jax.ShapeDtypeStruct((b, 32), jnp.float32))
    SHARP(exported.call(sparse["params"], sparse["sparsity"], x), model.apply(sparse, x))
    dense = msbp.densify(sparse)
    norm = lambda f: lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x) ** 2)
    got = jax.grad(norm(lambda x: model.apply(sparse, x)))(x)
    SHARP(got, jax.grad(norm(lambda x: MLP().apply(dense, x)))(x))
    assert {row.backend for row in model.report(sparse, x).weights} == {"xla, dense"}
    wrapped = msbp.sparse_weights(msbp.sparse_vjp(MLP(), msbp.dithered(2), backend="xla"))
    assert {row.backend for row in wrapped.report(sparse, x).weights} == {"xla, dense"}
    with pytest.raises(ValueError, match="There is no backend 'gpu' of sparse weights"):
        msbp.sparse_weights(MLP(), backend="gpu")


def test_what_leaves_a_branch_or_is_never_multiplied_is_in_the_report():
    w, x = random_gradient(0, 12, 30), random_gradient(1, 5, 12)
    sparse = msbp.prune({"params": {"kernel": w, "other": w}}, density=0.1, include=["kernel"])
    cast = lambda w: w.astype(jnp.bfloat16)
    f = msbp.sparse_weights(lambda p, x: x.astype(jnp.bfloat16) @ jax.lax.cond(x.sum() > 0, cast, cast, p["kernel"]))
    (row,) = f.report(sparse["params"], sparse["sparsity"], x).weights
    assert "what a branch returns sees the dense weight; no product with it is sparse" in row.warning
    g = msbp.sparse_weights(lambda p, x: (x @ p["other"], p["kernel"]))
    dense = msbp.densify(sparse)["params"]["kernel"]
    SHARP(g(sparse["params"], sparse["sparsity"], x)[1], dense)
    (row,) = g.report(sparse["params"], sparse["sparsity"], x).weights
    assert "what the model returns sees the dense weight" in row.warning


def test_a_weight_used_twice_and_parameters_in_a_list():
    w, x = random_gradient(0, 20, 20), random_gradient(1, 5, 20)
    f = lambda params, x: jnp.tanh(jnp.tanh(x @ params[0]) @ params[0].T) @ params[1]
    sparse = msbp.prune({"params": [w, 2 * w]}, density=0.15, include=["*"])
    g, dense = msbp.sparse_weights(f), msbp.densify(sparse)["params"]
    loss = lambda f: lambda p, *rest: jnp.sum(jnp.sin(f(p, *rest)))
    got = jax.grad(loss(g))(sparse["params"], sparse["sparsity"], x)
    want = jax.grad(loss(f))(dense, x)
    SHARP(msbp.densify({**sparse, "params": got})["params"], masked(sparse, want))
    rows = g.report(sparse["params"], sparse["sparsity"], x).weights
    assert [row.products for row in rows] == [2, 1]


def test_a_function_with_its_memory_among_the_parameters():
    w, x = random_gradient(0, 20, 30), random_gradient(1, 8, 20)
    sparse = msbp.prune({"params": {"kernel": w}}, density=0.2)
    f = lambda p, x: x @ p["kernel"]
    g = msbp.sparse_weights(msbp.sparse_vjp(f, msbp.memorized(msbp.top_k(k=4), decay=0.5), min_features=1))
    params = g.with_memory(sparse["params"], sparse["sparsity"], x)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(g(p, sparse["sparsity"], x))))(params)
    assert grads["params"]["kernel"].shape == (120,)
    again = g.with_memory(params, sparse["sparsity"], x[:4])
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_what_is_refused():
    x = jnp.ones((3, 32))
    model, sparse, _ = twins(MLP(), x)
    with pytest.raises(ValueError, match=r'have "params" and "sparsity", as msbp\.prune returns them; got'):
        model.apply({"params": sparse["params"]}, x)
    with pytest.raises(TypeError, match="one wrapping is enough"):
        msbp.sparse_weights(model)
    with pytest.raises(TypeError, match="takes a Flax module or a function"):
        msbp.sparse_weights(MLP)
    with pytest.raises(TypeError, match="takes a Flax module or a function"):
        msbp.sparse_weights(3)
    other = msbp.prune(nn.Dense(5).init(KEY, x), density=0.1)
    with pytest.raises(ValueError, match="There are patterns of kernel"):
        model.apply({"params": sparse["params"], "sparsity": other["sparsity"]}, x)
    wrapped = msbp.sparse_weights(msbp.sparse_vjp(MLP(), msbp.memorized(msbp.top_k(k=3), decay=1.0), min_features=1))
    with pytest.raises(ValueError, match="is differentiated without its memory"):
        jax.grad(lambda p: wrapped.apply({**sparse, "params": p}, x).sum())(sparse["params"])
    assert "sparse_weights(sparse_vjp(MLP" in repr(wrapped)
    for of in (model, msbp.sparse_weights(lambda w, x: x @ w)):
        with pytest.raises(TypeError, match="The order is the other one"):
            msbp.sparse_vjp(of, msbp.dithered(2))
    with pytest.raises(TypeError, match="is a Linen module: call it as"):
        model(x)
    assert jax.tree.structure(model.init_with_output(KEY, x)[1]) == jax.tree.structure(model.lazy_init(KEY, x))
    assert "Dense_0" in model.tabulate(KEY, x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return msbp.sparse_weights(nn.Dense(3)).init(KEY, x)

    with pytest.raises(ValueError, match="was called inside a Linen module, on its part Dense"):
        Outer().init(KEY, x)
    assert repr(msbp.sparse_weights(lambda w, x: x @ w)).startswith("sparse_weights(")
