"""The Pallas kernels: against float64, interpreted here and compiled where there is an accelerator; what they decline.

On a machine with one: `python -m pytest tests/kernels/test_pallas.py --accelerator`.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax._compat._pallas import pallas_tpu
from msbp_jax.formats import take_columns
from msbp_jax.kernels.choice import roofline, target
from msbp_jax.kernels.choice.advice import expected_speed_up, note, warning
from msbp_jax.kernels.choice.layer import Layer
from msbp_jax.kernels.choice.order import fastest_first, selection_order
from msbp_jax.kernels.pallas import kernel, tiles
from msbp_jax.testing import dense_products, random_gradient, written_out

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")]

HERE = jax.default_backend()
PLATFORMS = ["tpu", "gpu"] if HERE == "cpu" else [HERE]
OPS = sorted(kernels.OPS)
# rows, m, n, k, rows per group: tiles that do not fit, one row, one group, one column, all columns, several tiles
SHAPES = [
    (12, 6, 20, 3, 1),
    (34, 150, 140, 131, 17),
    (9, 8, 16, 15, None),
    (40, 130, 129, 1, 20),
    (33, 24, 40, 40, 16),
]


@pytest.fixture(autouse=True)
def _exact_products():
    """An accelerator multiplies float32 in fewer bits, if nobody asks for all of them; a CPU never does."""
    with contextlib.nullcontext() if HERE == "cpu" else jax.default_matmul_precision("highest"):
        yield


def kept_by_hand(g, k, group):
    """Return the columns with the largest sums of magnitudes, ties to the lower, in order."""
    rows, n = g.shape
    r = min(group or rows, rows)
    filled = np.zeros((-(-rows // r) * r, n), np.float32)
    filled[:rows] = np.abs(np.asarray(g, np.float32))
    scores = filled.reshape(-1, r, n).sum(1)
    return jnp.asarray(np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1), jnp.int32)


def ran(function, *operands):
    """Run a function under jit and check that a Pallas kernel is what ran."""
    traced = jax.jit(function).trace(*operands)
    assert "pallas_call" in str(traced.jaxpr)
    return traced.lower().compile()(*operands)


@pytest.fixture
def alone(monkeypatch):
    """On one device the rule for splitting over several is not traced, which takes its time; it has its own tests."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def body_of_the_test(op, platform, dtype, rows, m, n, k, group):
    """Check one op on one shape, on whatever device there is."""
    g, x, w = (random_gradient(i, *shape).astype(dtype) for i, shape in enumerate([(rows, n), (rows, m), (m, n)]))
    half = dtype == jnp.bfloat16
    match op:
        case "select":
            found = ran(lambda g: kernels.select(g, k, group, backend=platform), g)
            np.testing.assert_array_equal(found.index, kept_by_hand(g, k, group))
            mask = written_out(found) != 0
            np.testing.assert_array_equal(written_out(found), np.where(mask, np.asarray(g, np.float64), 0))
            assert mask.sum() == rows * k
        case "select_with_memory":
            for memory in (random_gradient(3, 1, n)[0], random_gradient(3, rows, n))[half:]:
                arguments = memory, k, group
                idle = np.isin(np.arange(rows), [1, rows // 2, rows - 1])[:, None]
                h = jnp.where(idle, jnp.zeros((), g.dtype), g)
                found, *rest = ran(lambda g, a=arguments: kernels.select_with_memory(g, *a, backend=platform), h)
                u = np.where(idle, 0, np.asarray(h, np.float32) + np.asarray(memory))
                np.testing.assert_array_equal(found.index, kept_by_hand(u, k, group))
                p = written_out(found)
                np.testing.assert_array_equal(p, np.where(p != 0, np.asarray(jnp.asarray(u, dtype), np.float64), 0))
                assert found.values.dtype == g.dtype
                left = np.where(p != 0, 0, u.astype(np.float64))
                want = left if memory.ndim == 2 else left.sum(0)
                np.testing.assert_allclose(rest[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
                np.testing.assert_array_equal(rest[1], ~idle if memory.ndim == 2 else [(~idle).sum()])
        case "grad_input" | "grad_weight":
            number, product = (0, kernels.grad_input) if op == "grad_input" else (1, kernels.grad_weight)
            p = take_columns(g, kept_by_hand(g, k, group), group)
            full, x64, w64 = written_out(p), np.asarray(x, np.float64), np.asarray(w, np.float64)
            for axis, result in ((0, jnp.float32), (1, dtype))[half:]:
                static = {"feature_axis": axis, "dtype": result, "precision": "highest", "backend": platform}
                found = ran(functools.partial(product, **static), p, (w if axis == 1 else w.T, x)[number])
                want = (full @ w64.T, x64.T @ full if axis == 1 else full.T @ x64)[number]
                assert found.dtype == result
                error = (1e-2 if half else 1e-5) * np.abs(want).max()
                np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=0, atol=error)
        case _:
            raise AssertionError(f"{op} has no test on an accelerator")


interpreted = pytest.mark.skipif(HERE != "cpu", reason="compiled, not interpreted, where there is an accelerator")


@interpreted
@pytest.mark.parametrize(("op", "platform"), [(op, platform) for op in OPS for platform in PLATFORMS])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_interpreted_against_float64(op, platform, number, alone):
    body_of_the_test(op, platform, (jnp.float32, jnp.bfloat16)[number % 2], *SHAPES[number])


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_no_races_on_a_simulated_tpu(op, monkeypatch, alone):
    """Copies, semaphores and memory of a TPU are simulated, with not-a-number in memory that nobody wrote."""
    raising = {"on_race": "raise"} if "on_race" in dir(pallas_tpu.InterpretParams) else {}
    params = pallas_tpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **raising)
    monkeypatch.setitem(kernel.INTERPRET, "tpu", params)
    body_of_the_test(op, "tpu", jnp.bfloat16, 22, 20, 140, 9, 8)


@pytest.mark.skipif(HERE == "cpu", reason="no accelerator here, or not asked for: see the first lines of this file")
@pytest.mark.parametrize("op", OPS if HERE != "cpu" else ["all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] if HERE != "cpu" else ["all"])
@pytest.mark.parametrize(
    "shape", [*SHAPES, (1024, 1024, 2048, 128, 128), (700, 500, 3000, 190, 100)] if HERE != "cpu" else ["all"]
)
def test_compiled_against_float64(op, dtype, shape):
    body_of_the_test(op, HERE, getattr(jnp, dtype), *shape)


@pytest.mark.skipif(HERE != "cpu", reason="interpreted here")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_op_has_a_file_for_every_platform(op, platform):
    assert platform in msbp.backends()[op]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bits_arrive_as_they_were(platform, alone):
    """Not-a-numbers and infinities are chosen first, and reach their place without touching others."""
    for dtype in (jnp.float32, jnp.bfloat16):
        g = random_gradient(0, 32, 60).astype(dtype).at[1, 9].set(jnp.inf).at[2, 4].set(jnp.nan).at[3, 5].set(-jnp.inf)
        p = jax.jit(lambda g: kernels.select(g, 20, 16, backend=platform))(g)
        assert {4, 5, 9} <= set(p.index[0].tolist())
        wanted = take_columns(g, p.index, 16).values
        np.testing.assert_array_equal(p.values.astype(jnp.float32), wanted.astype(jnp.float32))
        ties = jax.jit(lambda g: kernels.select(g, 7, 16, backend=platform))(jnp.ones((16, 300), dtype))
        assert ties.index.tolist() == [list(range(7))]


def backward(platform, group, u, x, w, memory):
    options = {"backend": platform}
    p, left, _ = kernels.select_with_memory(u, memory, 7, group, **options)
    return kernels.grad_input(p, w, 1, **options), kernels.grad_weight(p, x, 1, **options), left


def arrays(copies=()):
    shapes = [(64, 80), (64, 20), (20, 80), (80,)]
    return [random_gradient(i, 1, int(np.prod((*copies, *s)))).reshape(*copies, *s) for i, s in enumerate(shapes)]


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-4), list(got), list(want))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_vmap_scan_and_remat(platform, alone):
    group, shared = (8, False) if platform == "tpu" else (None, True)  # a choice for all rows, and one weight for all
    both = arrays((2,))
    both[2] = both[2][0] if shared else both[2]
    axes = (0, 0, None if shared else 0, 0)
    run = functools.partial(backward, platform, group)
    one = lambda i: [a if axis is None else a[i] for a, axis in zip(both, axes, strict=True)]
    want = [jnp.stack(parts) for parts in zip(*(backward("xla", group, *one(i)) for i in range(2)), strict=True)]
    assert_close(jax.jit(jax.vmap(jax.checkpoint(run), in_axes=axes))(*both), want)
    if not shared:
        assert_close(jax.jit(lambda *a: jax.lax.map(lambda one: run(*one), a))(*both), want)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("group", "sums"), [(8, 1), (None, 2)])
def test_rows_split_over_devices_stay_there(platform, group, sums):
    operands = arrays()
    want = backward("xla", group, *operands)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    by_rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("d",), ()))
    placed = jax.device_put(operands, [by_rows, by_rows, whole, whole])
    compiled = jax.jit(functools.partial(backward, platform, group)).lower(*placed).compile()
    assert_close(compiled(*placed), want)
    text = compiled.as_text()
    assert " all-gather(" not in text
    # One for dw and the memory together, and with one choice for all rows one for the scores.
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") <= sums + 1


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("platform", PLATFORMS)
def test_inside_shard_map_with_varying_axes_checked(platform):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = PartitionSpec("d"), PartitionSpec()

    def body(*operands):
        dx, dw, after = backward(platform, 8, *operands)
        return dx, jax.lax.psum(dw, "d"), jax.lax.psum(after, "d")

    specs = {"in_specs": (split, split, whole, whole), "out_specs": (split, whole, whole)}
    operands = arrays()
    got = jax.jit(jax.shard_map(body, mesh=mesh, check_vma=True, **specs))(*operands)
    assert_close(got, backward("xla", 8, *operands))


@pytest.mark.skipif(HERE == "tpu", reason="of the GPU's kernel")
def test_chunks_of_products(monkeypatch):
    """The GPU's dw in several pieces, inside `shard_map` too, is the dw in one."""
    from msbp_jax.kernels.columns.grad_weight import gpu

    u, x, _, _ = arrays()
    x = jnp.tile(x, (1, 7))
    p = kernels.select(u, 9, 16, backend="xla")
    call = lambda x: kernels.grad_weight(p, x, 1, backend="gpu")
    whole = jax.jit(call)(x)
    loops = lambda: str(jax.make_jaxpr(lambda x: call(x))(x)).count("scan[")
    in_one = loops()
    monkeypatch.setattr(gpu, "_PRODUCTS_BYTES", 4096)
    monkeypatch.setattr(gpu, "_COLUMNS", 64)
    assert loops() == in_one + 1  # the one over pieces
    np.testing.assert_array_equal(jax.jit(lambda x: call(x))(x), whole)


BACKENDS = [name for name in msbp.backends()["grad_input"] if HERE == "cpu" or name in (HERE, "xla", "dense")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_values_of_8_bits_with_a_scale(backend, dtype, alone):
    rows, m, n, k, group = 48, 20, 36, 7, 16
    u, x, w = random_gradient(0, rows, n), random_gradient(1, rows, m), random_gradient(2, m, n)
    exact = kernels.select(u, k, group, backend="xla")
    scale = jnp.abs(exact.values).max(axis=(1, 2)) / 100
    levels = jnp.round(exact.values / scale[:, None, None]).astype(dtype)
    p = dataclasses.replace(exact, values=levels, scale=scale, unchanged=False)
    assert (p.astype(jnp.float32).scale, p.dequantized(jnp.float32).values.dtype) == (None, jnp.float32)
    wanted = dense_products(p, x, w, 1)
    for product, other, want in zip((kernels.grad_input, kernels.grad_weight), (w, x), wanted, strict=True):
        got = jax.jit(lambda p, other, product=product: product(p, other, 1, backend=backend))(p, other)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_scale_must_fit():
    p = kernels.select(random_gradient(0, 4, 6), 2, 2)
    with pytest.raises(ValueError, match=r"cotangent\.scale must be \[G\], \(2,\) here, got \(3,\)"):
        kernels.grad_input(dataclasses.replace(p, scale=jnp.ones(3)), jnp.ones((5, 6)), 1)
    with pytest.raises(TypeError, match=r"cotangent\.scale must"):
        kernels.grad_input(dataclasses.replace(p, scale=jnp.ones(2, jnp.int32)), jnp.ones((5, 6)), 1)
    with pytest.raises(TypeError, match=r"cotangent\.values must"):
        kernels.grad_input(dataclasses.replace(p, values=p.values.astype(jnp.int8)), jnp.ones((5, 6)), 1)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_second_derivative(platform, alone):
    u, x, w, memory = arrays()
    calls = {
        "grad_input": lambda w: backward(platform, 8, u, x, w, memory)[0],
        "grad_weight": lambda x: backward(platform, 8, u, x, w, memory)[1],
        "select_with_memory": lambda u: backward(platform, 8, u, x, w, memory)[0],
        "select": lambda u: kernels.select(u, 3, 8, backend=platform).values,
    }
    for (op, call), operand in zip(calls.items(), (w, x, u, u), strict=True):
        with pytest.raises(NotImplementedError, match=f'{op} ran in a Pallas kernel.*pass backend="xla"'):
            jax.eval_shape(lambda x, call=call: jax.jvp(call, (x,), (x,)), operand)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("dense", "tpu")])
def test_a_hessian_says_what_to_do(backend):
    spec = msbp.top_k(k=2, rows_per_group=8)
    f = msbp.sparse_vjp(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2), spec, min_features=1, backend=backend)
    w, x = random_gradient(0, 5, 6), random_gradient(1, 16, 5)
    memory = f.init_memory(w, x)
    gradient = jax.grad(lambda w: f(w, x, memory=memory))
    if backend == "xla":
        assert np.isfinite(jax.jvp(gradient, (w,), (w,))[1]).all()
        return
    with pytest.raises(NotImplementedError, match='For second derivatives pass backend="xla" to sparse_vjp'):
        jax.jvp(gradient, (w,), (w,))


@pytest.mark.skipif(HERE != "cpu", reason="about a CPU")
def test_a_report_says_that_kernels_are_interpreted():
    w, x = jnp.ones((64, 96)), jnp.ones((32, 64))
    for backend in ("gpu", "tpu"):
        f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=8, rows_per_group=16), backend=backend)
        said = " ".join(str(f.report(w, x)).split())
        assert f"the {backend} kernels are interpreted on a CPU: slowly, for tests." in said
    with on("NVIDIA H200"):
        assert warning(Layer(64, 64, 96, 8, 16), "native") == ""


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_they_decline(platform, monkeypatch):
    u = jnp.ones((4, 6))
    with pytest.raises(NotImplementedError, match=f"the {platform} kernels take float32 and bfloat16, got float16"):
        kernels.select(u.astype(jnp.float16), 2, 2, backend=platform)
    p, w = kernels.select(u, 2, 2, backend="xla"), jnp.ones((5, 6))
    for static in ({"dtype": jnp.float16}, {}):
        halved = p if static else p.astype(jnp.float16)
        with pytest.raises(NotImplementedError, match="take float32 and bfloat16, got float16"):
            kernels.grad_input(halved, w, 1, backend=platform, **static)
    with pytest.raises(NotImplementedError, match="take one precision for both operands"):
        kernels.grad_input(p, w, 1, precision=("default", "highest"), backend=platform)
    with pytest.raises(NotImplementedError, match=r"take the precisions of jax\.lax\.Precision"):
        kernels.grad_weight(p, jnp.ones((4, 5)), 1, precision="BF16_BF16_F32_X3", backend=platform)
    with (
        on("TPU v3" if platform == "tpu" else "AMD Instinct MI300X"),
        pytest.raises(NotImplementedError, match="made for"),
    ):
        kernels.select(u, 2, 2, backend=platform)
    monkeypatch.setattr(jax, "default_backend", lambda: "rocm" if platform == "tpu" else "tpu")
    other = "gpu" if platform == "tpu" else "tpu"
    with pytest.raises(NotImplementedError, match=f"run on {platform.upper()}, and the program is for {other}"):
        kernels.select(u, 2, 2, backend=platform)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_several_tpus(monkeypatch):
    """There XLA serves, but inside `shard_map`; a report says so."""
    u = jnp.ones((64, 96))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=2, rows_per_group=8))
    with on("TPU v5 lite"):
        with pytest.raises(
            NotImplementedError, match=r"the 8 devices of a jit-compiled program.*Inside jax\.shard_map it"
        ):
            kernels.select(u, 2, 8, backend="tpu")
        assert "pallas_call" not in str(jax.make_jaxpr(lambda u: kernels.select(u, 2, 8).values)(u))
        assert "Outside shard_map, xla serves for tpu" in " ".join(str(f.report(u.T, u)).split())
    for check_vma in (True, False):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        mapped = jax.shard_map(
            lambda u: kernels.select(u, 2, 8, backend="tpu").values,
            mesh=mesh.abstract_mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=check_vma,
        )
        assert "pallas_call" in str(jax.make_jaxpr(mapped)(u))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernel, "pallas_triton", None)
    with pytest.raises(NotImplementedError, match="the gpu kernels need Pallas-Triton"):
        kernels.select(jnp.ones((4, 6)), 2, 2, backend="gpu")


@pytest.mark.skipif("tpu" not in PLATFORMS, reason="of a TPU")
def test_the_budget_of_fast_memory(monkeypatch):
    u = jnp.ones((16, 300))
    monkeypatch.setattr(kernel, "VMEM_BYTES", 10_000)
    with pytest.raises(NotImplementedError, match=r"would take [0-9]+ bytes of fast memory, of 10000"):
        kernels.select(u, 2, 16, backend="tpu")
    assert kernel._tiled_bytes((2, 3, 130), jnp.bfloat16) == 2 * 8 * 256 * 2


def test_tiles():
    assert tiles.tile_of(8192, 3072, 128) == 2048  # exact, rather than fewer
    assert tiles.tile_of(300, 4096, 128) == 384
    assert tiles.tile_of(700, 256, 16) == 240
    assert [tiles.power_of_two(size, 128) for size in (1, 16, 17, 1000)] == [16, 16, 32, 128]


def on(kind):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


CHIPS = [
    "TPU v5 lite",
    "TPU v5",
    "TPU v6 lite",
    "TPU7x",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA A100-SXM4-80GB",
]
KERNELS = {
    "tpu": {"msbp_places", "msbp_kept_entries", "msbp_grad_input", "msbp_grad_weight"},
    "gpu": {"msbp_best_columns", "msbp_kept_entries", "msbp_grad_input", "msbp_kept_products", "msbp_sums_of_products"},
}


@pytest.mark.skipif(HERE != "cpu", reason="crosses from a CPU to other platforms")
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_which_kernels_are_in_the_program_of_a_platform(platform, alone):
    """A whole value_and_grad, lowered for another platform: what is chosen there, and what is asked for by name."""
    layer = 8192, 4096, 4096
    wanted = {None: KERNELS[platform], "xla": set()}

    def lowered(backend, rows, m, n):
        f = msbp.sparse_vjp(
            lambda w, x: jnp.sum((x @ w[0]) @ w[1]),
            msbp.memorized(msbp.top_k(density=1 / 16, rows_per_group=128), decay=0.8),
            backend=backend,
        )
        w0, w1, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, n), (n, m), (rows, m)))
        with on("TPU v5 lite" if platform == "tpu" else "NVIDIA H100 80GB HBM3"):
            memory = f.init_memory((w0, w1), x)
            step = jax.jit(msbp.value_and_grad(lambda w, memory, x: f(w, x, memory=memory)))
            traced = step.trace((w0, w1), memory, x)
            text = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",)).as_text()
            report = " ".join(str(f.report((w0, w1), x)).split())
        return {name for name in set.union(*KERNELS.values()) if name in text}, text, report

    for backend, names in wanted.items():
        found, text, report = lowered(backend, *layer)
        assert found == names
        assert "ffi" not in text
        assert f" {backend or platform}; " in report
        assert "not from measurements" in report


LAYER = Layer(8192, 8192, 8192, 512, 128)


@pytest.mark.parametrize(
    ("layer", "chosen", "measured"),
    [
        (LAYER, "gpu", 2.29),
        (LAYER._replace(rows_per_group=8192), "xla", 4.77),
        (LAYER._replace(rows_per_group=1), "dense", 0.35),
        (LAYER._replace(k=2048), "gpu", 0.67),
        (LAYER._replace(k=2048, rows_per_group=8192), "xla", 2.42),
        (Layer(16384, 4096, 16384, 1024, 128), "gpu", 2.12),
        (Layer(16384, 4096, 16384, 4096, 128), "gpu", 0.86),
        (Layer(16384, 4096, 16384, 4096, 1), "dense", 0.24),
    ],
)
def test_the_model_of_a_gpu_is_near_what_was_measured(layer, chosen, measured):
    """On an H200, see benchmarks/results/accelerator.md: within a third."""
    with on("NVIDIA H200"):
        assert fastest_first(layer)[0] == chosen
        assert measured / 1.34 < expected_speed_up(layer) < measured * 1.34


def test_the_order_of_backends_elsewhere():
    for kind in CHIPS:
        with on(kind):
            own = target.platform()
            assert target.device().kind == kind
            assert selection_order(1024, 128) == (own, "xla")
            assert selection_order(1024, 1) == ("xla",)
            assert selection_order(8, None) == ("xla",)
            assert sorted(fastest_first(LAYER)) == sorted([own, "xla", "dense"])
            assert fastest_first(LAYER._replace(rows_per_group=8192))[0] == "xla"  # one choice: XLA's own products
            assert fastest_first(LAYER._replace(rows_per_group=1))[0] == "dense"
            assert "probably slower than the dense one here" in warning(LAYER._replace(rows_per_group=1))
            assert expected_speed_up(LAYER._replace(rows_per_group=8192)) > 2
            assert "not from measurements" in note()
    with on("NVIDIA Nonesuch"):
        assert not roofline.known(target.device())
        assert fastest_first(LAYER)[0] == "gpu"


@pytest.mark.skipif("native" not in kernels.backends()["select"], reason="the native kernels were not built")
def test_native_kernels_are_for_cpus():
    with (
        on("NVIDIA H100 80GB HBM3"),
        pytest.raises(NotImplementedError, match="run on CPU, and the program is for gpu"),
    ):
        kernels.select(jnp.ones((4, 6)), 2, 2, backend="native")
