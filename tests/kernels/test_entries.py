"""The ops for `Entries`: every backend against the reference, bit for bit where it says so, and products in float64."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from twins import assert_trees_close

from msbp_jax import kernels
from msbp_jax.formats import Entries
from msbp_jax.kernels import entries
from msbp_jax.kernels.entries import quantized
from msbp_jax.kernels.entries.noise import uniform
from msbp_jax.kernels.native import calls
from msbp_jax.testing import random_gradient

BACKENDS = list(entries.OPS["grad_input"])
MAKERS = list(entries.OPS["dither"])
PRODUCTS = ["grad_input", "grad_weight"]
KEY = jnp.array([123456789, 4070199207], jnp.uint32)
native = pytest.mark.skipif(not calls.available(), reason="the native kernels were not built")
backends = pytest.mark.parametrize("backend", BACKENDS)


def gradient(seed, rows, n, dtype="float32", *, spoiled=False):
    """Return a gradient with heavy tails, idle rows and, if it is to be spoiled, entries that are not finite."""
    g = random_gradient(seed, rows, n)
    g = g.at[:: max(2, rows // 3)].set(0)
    if spoiled:
        g = g.at[-1, 0].set(jnp.nan).at[-1, -1].set(jnp.inf).at[rows // 2, n // 2].set(-jnp.inf)
    return g.astype(dtype)


def some_entries(seed, rows, n, density, dtype="float32", scale=None):
    draw = np.random.default_rng(seed)
    values = np.where(draw.random((rows, n)) < density, random_gradient(seed, rows, n), 0)
    return Entries(jnp.asarray(values).astype(dtype), None if scale is None else jnp.float32(scale))


def same(a, b):
    a, b = (jnp.asarray(array).astype(jnp.float32) for array in (a, b))
    np.testing.assert_array_equal(a, b)


# --- noise -----------------------------------------------------------------------------------------------------------


def noise(key, rows, n, first=0):
    return uniform(key, first + jnp.arange(rows, dtype=jnp.uint32), jnp.arange(n, dtype=jnp.uint32))


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_uniform_and_alike_for_neither_rows_nor_columns_nor_keys(seed):
    key = jax.random.bits(jax.random.key(seed), (2,), jnp.uint32)
    v = np.asarray(noise(key, 512, 512), np.float64)
    assert v.min() > 0
    assert v.max() < 1
    np.testing.assert_array_equal(v * 2**24 % 2, 1)
    assert 1e-4 < scipy.stats.chisquare(np.histogram(v, 256, (0, 1))[0]).pvalue < 1 - 1e-4
    assert 1e-4 < scipy.stats.chisquare(np.histogram(v * 256 % 1, 256, (0, 1))[0]).pvalue < 1 - 1e-4
    others = [noise(key ^ jnp.array(bit, jnp.uint32), 512, 512) for bit in ([1, 0], [0, 1], [1 << 31, 0])]
    pairs = [(v[1:], v[:-1]), (v[:, 1:], v[:, :-1]), (v[1:, 1:], v[:-1, :-1]), *((v, other) for other in others)]
    for a, b in pairs:
        correlation = np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
        assert abs(correlation) < 4.5 / 512, "of 512 x 512 independent pairs it is below 4.5 of its deviations"
        # And of the pairs themselves: every square of a grid of 8 x 8 is as full as any other.
        counts = np.histogram2d(np.ravel(a), np.ravel(b), 8, [(0, 1), (0, 1)])[0]
        assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-5
    rows, columns = v.mean(1), v.mean(0)  # means of 512 uniform numbers
    for means in (rows, columns):
        assert scipy.stats.kstest((means - 0.5) * np.sqrt(12 * 512), "norm").pvalue > 1e-4


def test_every_entry_of_the_noise_can_be_asked_for_by_itself():
    whole = noise(KEY, 40, 30)
    np.testing.assert_array_equal(noise(KEY, 7, 30, first=20), whole[20:27])
    one = uniform(KEY, jnp.array([3], jnp.uint32), jnp.array([29], jnp.uint32))
    np.testing.assert_array_equal(one, whole[3:4, 29:])


def test_noise_in_pallas_has_the_same_bits():
    """The same function in a kernel, block by block."""

    def kernel(key, out):
        block = pl.program_id(0).astype(jnp.uint32) * 8
        out[:] = uniform(key[:], block + jnp.arange(8, dtype=jnp.uint32), jnp.arange(128, dtype=jnp.uint32))

    made = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((2,), lambda i: (0,))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
        interpret=True,
    )(KEY)
    np.testing.assert_array_equal(made, noise(KEY, 32, 128))


# --- dither and row_moments ------------------------------------------------------------------------------------------


def by_numpy(g, v, step, *, prunes):
    """Return what is made of a gradient in float32, by the formula."""
    g, v, step = np.asarray(g, np.float32), np.asarray(v, np.float32), np.float32(step)
    with np.errstate(invalid="ignore"):
        if prunes:
            return np.where(np.abs(g) / step < 1, np.where(v < np.abs(g) / step, np.copysign(step, g), 0), g)
        return np.floor(g / step + v)


@pytest.mark.parametrize("backend", MAKERS)
@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@hypothesis.given(
    rows=st.sampled_from([1, 3, 40]), n=st.sampled_from([1, 17, 64, 70]), seed=st.integers(0, 99),
    step=st.sampled_from([0.0, 0.25, 1.0, 3.0]), spoiled=st.booleans(),
)  # fmt: skip
@hypothesis.settings(max_examples=15)
def test_every_backend_makes_what_the_formula_says_to_the_bit(backend, prunes, dtype, rows, n, seed, step, spoiled):
    g = gradient(seed, rows, n, dtype, spoiled=spoiled)
    made, kept = kernels.dither(g, KEY, jnp.float32(step), prunes=prunes, backend=backend)
    want = np.asarray(g, np.float32) if step == 0 else by_numpy(g, noise(KEY, rows, n), step, prunes=prunes)
    if step and not prunes and dtype == "float32":
        want = want * np.float32(step)
    assert made.dtype == g.dtype
    same(made, jnp.asarray(want).astype(dtype))
    np.testing.assert_array_equal(kept, (want != 0).sum(1))


@pytest.mark.parametrize("prunes", [False, True])
def test_float16_and_float64(prunes):
    g = gradient(0, 30, 40, "float16", spoiled=True)
    made, _ = kernels.dither(g, KEY, jnp.float32(0.5), prunes=prunes)
    same(made, jnp.asarray(by_numpy(g, noise(KEY, 30, 40), 0.5, prunes=prunes)).astype("float16"))
    with jax.enable_x64(True):
        g = gradient(0, 30, 40, "float64") + 1e-12
        made, _ = kernels.dither(g, KEY, jnp.float64(0.1), prunes=prunes)
        assert made.dtype == jnp.float64
        assert float(kernels.spread(g)) == pytest.approx(np.asarray(g).std(), rel=1e-12)


@native
@pytest.mark.parametrize("number", range(len(calls.instruction_sets())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "m", "n"), [(40, 70, 100), (1100, 129, 37), (7, 5, 2500)])
def test_every_instruction_set(number, dtype, rows, m, n):
    g, numbers, step = gradient(0, rows, n, dtype, spoiled=True), jnp.arange(rows, dtype=jnp.uint32), jnp.ones(1)
    results, options = [((rows, n), g.dtype), ((rows,), jnp.float32)], {"instruction_set": number}
    for prunes in (False, True):
        made, kept = calls.call("dither", [g, numbers, KEY, step], results, prunes=prunes, **options)
        want, counted = kernels.dither(g, KEY, step[0], prunes=prunes, backend="xla")
        same(made, want)
        same(kept, counted)
    (moments,) = calls.call("row_moments", [g], [((rows, 3), jnp.float32)], **options)
    np.testing.assert_allclose(moments, entries.OPS["row_moments"]["xla"](g), rtol=2e-5, atol=1e-4)
    p = some_entries(0, rows, n, 0.2, dtype)
    for axis in (0, 1):
        x, w = operands(0, rows, m, n, axis, dtype)
        options["features_last"], scale = axis == 1, jnp.full(1, 0.5)
        (dx,) = calls.call("entries_grad_input", [p.values, scale, w], [((rows, m), jnp.float32)], **options)
        (dw,) = calls.call("entries_grad_weight", [p.values, scale, x], [(w.shape, jnp.float32)], **options)
        for got, want in zip((dx, dw), in_float64(p, x, w, axis).values(), strict=True):
            np.testing.assert_allclose(got, want / 2, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("backend", MAKERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (33, 70), (700, 9)])
def test_the_spread_is_that_of_finite_entries_of_rows_that_are_not_0(backend, dtype, shape):
    g = gradient(0, *shape, dtype, spoiled=shape[0] > 30)
    values = np.asarray(g, np.float64)
    counted = values[values.any(axis=1)]
    counted = counted[np.isfinite(counted)]
    got = float(kernels.spread(g, backend=backend))
    assert got == pytest.approx(counted.std() if counted.size else 0, rel=1e-5)
    # A mean a thousand times as large as the spread is no matter, nor are numbers that are all alike.
    far = jnp.where(takes(g), jnp.nan_to_num(g.astype(jnp.float32), posinf=1, neginf=1, nan=1) + 1000, 0)
    some = np.asarray(far, np.float64)[np.asarray(takes(g))[:, 0]]
    assert float(kernels.spread(far, backend=backend)) == pytest.approx(
        some.std() if some.size else 0, rel=1e-4, abs=1e-9
    )
    alike = jnp.where(takes(g), jnp.asarray(0.1, dtype), jnp.zeros((), dtype))
    assert float(kernels.spread(alike, backend=backend)) == 0.0


def takes(g):
    return (g != 0).any(axis=1, keepdims=True)


@pytest.mark.parametrize("backend", MAKERS)
def test_made_alike_under_jit_vmap_and_over_devices(backend):
    g = gradient(0, 64, 40)
    make = lambda g, key=KEY: kernels.dither(g, key, jnp.float32(2.0), backend=backend)
    want = jax.jit(make)(g)
    jax.tree.map(np.testing.assert_array_equal, make(g), want)
    keys = jnp.stack([KEY, KEY + 1])
    both = jax.vmap(make)(jnp.stack([g, 2 * g]), keys)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), both, want)
    assert not np.array_equal(both[0][1], 2 * want[0])
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    call = jax.jit(functools.partial(kernels.dither, key=KEY, step=jnp.float32(2.0), backend=backend))
    spread = jax.device_put(g, NamedSharding(mesh, PartitionSpec("rows")))
    jax.tree.map(np.testing.assert_array_equal, call(spread), call(g))
    assert "all-" not in call.lower(spread).compile().as_text()
    deviation = jax.jit(lambda g: kernels.spread(g, backend=backend))
    np.testing.assert_allclose(deviation(spread), deviation(g), rtol=1e-6)
    assert "f32[64,40]" not in deviation.lower(spread).compile().as_text(), "nobody has all rows"


# --- products --------------------------------------------------------------------------------------------------------


def operands(seed, rows, m, n, axis, dtype="float32"):
    x, w = random_gradient(seed + 1, rows, m).astype(dtype), random_gradient(seed + 2, m, n).astype(dtype)
    return x, w if axis == 1 else w.T


def in_float64(p, x, w, axis):
    """Return dx and dw by NumPy."""
    g, x, w = (np.asarray(a, np.float64) for a in (p.values, x, w))
    g = g * float(p.scale_or_one())
    dx, dw = (g @ w.T, x.T @ g) if axis == 1 else (g @ w, g.T @ x)
    return {"grad_input": dx, "grad_weight": dw}


def product(op, p, x, w, axis, **options):
    return getattr(kernels, op)(p, w if op == "grad_input" else x, axis, **options)


def check_against_float64(p, x, w, axis, backend, tolerance=1e-5):
    for op, want in in_float64(p, x, w, axis).items():
        got = product(op, p, x, w, axis, backend=backend)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=1e-30))


@backends
@hypothesis.given(
    rows=st.integers(1, 70), m=st.integers(1, 40), n=st.integers(1, 40), axis=st.integers(0, 1),
    density=st.sampled_from([0, 0.02, 0.1, 0.5, 1]), scale=st.sampled_from([None, 0.375]),
    dtype=st.sampled_from(["float32", "bfloat16"]), seed=st.integers(0, 99),
)  # fmt: skip
@hypothesis.settings(max_examples=15)
def test_products_against_float64(backend, rows, m, n, axis, density, scale, dtype, seed):
    p = some_entries(seed, rows, n, density, dtype, scale)
    check_against_float64(p, *operands(seed, rows, m, n, axis, dtype), axis, backend)


@backends
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "m", "n"), [(2100, 30, 40), (50, 700, 90), (40, 60, 2300)])
def test_sizes_beyond_one_tile(backend, rows, m, n, axis):
    check_against_float64(some_entries(0, rows, n, 0.1), *operands(0, rows, m, n, axis), axis, backend)


@pytest.mark.parametrize("backend", ["xla", None])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes(backend, dtype):
    with jax.enable_x64(dtype == "float64"):
        p, (x, w) = some_entries(0, 40, 20, 0.3, dtype), operands(0, 40, 10, 20, 1, dtype)
        check_against_float64(p, x, w, 1, backend, tolerance=1e-12 if dtype == "float64" else 1e-5)


@backends
@pytest.mark.parametrize("op", PRODUCTS)
def test_the_result_has_the_dtype_that_is_asked_for(backend, op):
    p, (x, w) = some_entries(0, 12, 5, 0.5, "bfloat16", 0.5), operands(0, 12, 4, 5, 1, "bfloat16")
    assert product(op, p, x, w, 1, backend=backend).dtype == jnp.float32
    assert product(op, p, x, w, 1, backend=backend, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@backends
@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_and_scan_over_members_of_different_densities(backend, op, shared):
    members = [some_entries(seed, 48, 20, density, scale=1 + seed) for seed, density in enumerate([0, 0.1, 0.4, 1])]
    x, w = operands(0, 48, 10, 20, 1)
    xs, ws = (a if shared else jnp.stack([a, 2 * a, 3 * a, 4 * a]) for a in (x, w))
    call = lambda p, x, w: product(op, p, x, w, 1, backend=backend)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    got = jax.jit(jax.vmap(call, in_axes=(0, None, None) if shared else 0))(stacked, xs, ws)
    each = jnp.stack([call(p, *(a if shared else a[i] for a in (xs, ws))) for i, p in enumerate(members)])
    assert_trees_close(got, each, rtol=1e-5)
    if shared:
        assert_trees_close(jax.lax.scan(lambda _, p: (None, call(p, x, w)), None, stacked)[1], each, rtol=1e-5)


@backends
@pytest.mark.parametrize("op", PRODUCTS)
def test_products_over_eight_devices(backend, op):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    p, (x, w) = some_entries(0, 64, 20, 0.2), operands(0, 64, 10, 20, 1)
    call = jax.jit(lambda p, x, w: product(op, p, x, w, 1, backend=backend))
    spread = jax.device_put((p, x), NamedSharding(mesh, PartitionSpec("rows")))
    assert_trees_close(call(*spread, w), call(p, x, w), rtol=1e-5)
    assert "all-gather" not in call.lower(*spread, w).compile().as_text()


@native
def test_the_bits_of_native_products_are_the_same_under_jit_vmap_and_remat():
    p, (x, w) = some_entries(0, 48, 20, 0.4), operands(0, 48, 10, 20, 1)
    call = lambda p, x, w: [product(op, p, x, w, 1, backend="native") for op in PRODUCTS]
    want = call(p, x, w)
    one = jax.tree.map(lambda a: a[None], (p, x, w))
    for got in (jax.jit(call)(p, x, w), jax.checkpoint(call)(p, x, w)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), jax.vmap(call)(*one), want)


def test_a_share_that_is_known_decides_which_products_run():
    x, _ = operands(0, 48, 10, 20, 1)
    for density, compiled in ((0.05, True), (0.9, False)):
        p = dataclasses.replace(some_entries(0, 48, 20, density), density=density)
        text = jax.jit(lambda p, x: kernels.grad_weight(p, x, 1)).lower(p, x).as_text()
        assert ("msbp_entries_grad_weight" in text) == (compiled and calls.available())


# --- 8 bits ----------------------------------------------------------------------------------------------------------


def levels(seed, rows, n, bits=8):
    most = 2 ** (bits - 1) - 1
    values = np.random.default_rng(seed).integers(-most, most + 1, (rows, n))
    return Entries(jnp.asarray(values, jnp.int8), jnp.float32(0.25), bits=bits, dtype=jnp.dtype("float32"))


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_sums_of_whole_numbers_are_exact(axes):
    a, b = (jnp.asarray(np.random.default_rng(i).integers(-127, 128, (2300, 20)), jnp.int8) for i in range(2))
    a, b = a if axes[0] == 0 else a.T, b if axes[1] == 0 else b.T
    want = np.asarray(a if axes[0] == 1 else a.T, np.int64) @ np.asarray(b if axes[1] == 0 else b.T, np.int64)
    np.testing.assert_array_equal(quantized.int_dot(a, b, axes), want)
    dims = (((axes[0],), (axes[1],)), ((), ()))
    np.testing.assert_array_equal(jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.int32), want)


def test_the_largest_sums_are_exact():
    """The worst that a chunk of float32 sums can meet."""
    a = jnp.full((5000, 2), 127, jnp.int8)
    np.testing.assert_array_equal(quantized.int_dot(a, -a, (0, 0)), np.full((2, 2), -5000 * 127**2))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_in_8_bits_are_those_of_the_rounded_operand(axis, bits):
    p, (x, w) = levels(0, 30, 40, bits), operands(0, 30, 20, 40, axis)
    for op, other, contracted in (("grad_input", w, axis), ("grad_weight", x, 0)):
        q, worth = quantized.quantized(other, contracted)
        rounded = np.asarray(q, np.float64) * np.expand_dims(np.asarray(worth, np.float64), contracted)
        assert np.abs(rounded - np.asarray(other)).max() <= 0.501 * float(worth.max())
        assert np.abs(np.asarray(q)).max() == 127
        want = in_float64(p, *((x, rounded) if op == "grad_input" else (rounded, w)), axis)[op]
        got = product(op, p, x, w, axis)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def test_slices_of_zeros_and_what_is_not_finite_in_8_bits():
    p, (x, _) = levels(0, 30, 40), operands(0, 30, 20, 40, 1)
    x = x.at[:, 3].set(0).at[5, 4].set(jnp.inf).at[6, 7].set(jnp.nan)
    dw = np.asarray(kernels.grad_weight(p, x, 1))
    np.testing.assert_array_equal(dw[3], 0)
    assert np.isnan(dw[[4, 7]]).all()
    assert np.isfinite(np.delete(dw, [4, 7], 0)).all()


# --- what is refused -------------------------------------------------------------------------------------------------

VALUES, X, W, F32 = jnp.ones((6, 20)), jnp.ones((6, 5)), jnp.ones((5, 20)), jnp.float32
NUMBERS, ONE = jnp.arange(6, dtype=jnp.uint32), jnp.ones(1)


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (Entries(VALUES.astype(int)), TypeError, "cotangent.values must be a floating-point array, got int"),
        (Entries(VALUES, bits=8), TypeError, "cotangent.values must be int8 levels where bits=8, got float32"),
        (Entries(VALUES[0]), ValueError, r"cotangent.values must be \[rows, n\], got \(20,\)"),
        (Entries(VALUES, ONE), ValueError, r"cotangent.scale must be one floating-point number, got float32\[1\]"),
    ],
)
def test_bad_cotangents(p, error, message):
    with pytest.raises(error, match=message):
        kernels.grad_input(p, W, 1)
    with pytest.raises(error, match=message):
        kernels.grad_weight(p, X, 1)


@native
@pytest.mark.parametrize(
    ("name", "arrays", "results"),
    [
        ("row_moments", [VALUES[0]], [((6, 3), F32)]),
        ("row_moments", [VALUES], [((6, 2), F32)]),
        ("row_moments", [VALUES.astype(jnp.float16)], [((6, 3), F32)]),
        ("dither", [VALUES, NUMBERS[:5], KEY, ONE], [((6, 20), F32), ((6,), F32)]),
        ("dither", [VALUES, NUMBERS.astype(jnp.int32), KEY, ONE], [((6, 20), F32), ((6,), F32)]),
        ("dither", [VALUES, NUMBERS, KEY[:1], ONE], [((6, 20), F32), ((6,), F32)]),
        ("dither", [VALUES, NUMBERS, KEY, jnp.ones(2)], [((6, 20), F32), ((6,), F32)]),
        ("dither", [VALUES, NUMBERS, KEY, ONE], [((6, 20), jnp.bfloat16), ((6,), F32)]),
        ("dither", [VALUES, NUMBERS, KEY, ONE], [((6, 20), F32), ((5,), F32)]),
        ("dither", [VALUES[:, :0], NUMBERS, KEY, ONE], [((6, 0), F32), ((6,), F32)]),
        ("entries_grad_input", [VALUES, jnp.ones(6), W], [((6, 5), F32)]),
        ("entries_grad_input", [VALUES, ONE, W.T], [((6, 5), F32)]),
        ("entries_grad_weight", [VALUES, ONE, X[:5]], [((5, 20), F32)]),
        ("entries_grad_weight", [VALUES.astype(jnp.int8), ONE, X], [((5, 20), F32)]),
    ],
)
def test_handlers_refuse_what_does_not_fit(name, arrays, results):
    options = {"dither": {"prunes": False}, "row_moments": {}}.get(name, {"features_last": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"msbp_jax: .* must (be|have) "):
        jax.block_until_ready(calls.call(name, arrays, results, **options))


@native
@pytest.mark.parametrize("op", PRODUCTS)
def test_native_kernels_decline_more_entries_than_they_number(op, monkeypatch):
    monkeypatch.setattr(calls, "MOST_ENTRIES", 120)
    with pytest.raises(NotImplementedError, match=r"the native kernels number up to 2\^31 entries, got 120"):
        product(op, Entries(VALUES), X, W, 1, backend="native")
    assert product(op, Entries(VALUES), X, W, 1).shape == ((6, 5) if op == "grad_input" else (5, 20))


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("op", PRODUCTS)
def test_8_bits_are_xlas_whatever_is_asked_for(op, backend):
    p, (x, w) = levels(0, 30, 40), operands(0, 30, 20, 40, 1)
    np.testing.assert_array_equal(product(op, p, x, w, 1, backend=backend), product(op, p, x, w, 1, backend="xla"))


# --- the format ------------------------------------------------------------------------------------------------------


def test_blocks_are_joined_unless_they_have_scales_of_their_own():
    blocks = [dataclasses.replace(some_entries(i, 4, 6, 0.5), share=jnp.float32(i / 2)) for i in range(2)]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks).joined((8, 6))
    np.testing.assert_array_equal(joined.materialize(), jnp.concatenate([p.materialize() for p in blocks]))
    assert float(joined.share) == 0.25
    assert levels(0, 4, 6).joined((8, 6)) is None


def test_another_dtype():
    p = some_entries(0, 4, 6, 0.5, "bfloat16", 0.5)
    assert p.astype(jnp.float32).materialize().dtype == jnp.float32
    q = levels(0, 4, 6)
    assert q.astype(jnp.bfloat16).values.dtype == jnp.int8
    assert q.astype(jnp.bfloat16).materialize().dtype == jnp.bfloat16
    assert dataclasses.replace(p, dtype=jnp.dtype("float16")).astype(jnp.float32).materialize().dtype == jnp.float32


def test_a_factor_that_is_taken_out_leaves_exact_levels():
    matrix, factor = Entries(jnp.full((2, 3), 3, jnp.bfloat16), jnp.float32(1.0039)).factored()
    np.testing.assert_array_equal(matrix.astype(F32), 3)
    assert (matrix.dtype, float(factor)) == (jnp.bfloat16, pytest.approx(1.0039))
    assert some_entries(0, 2, 3, 1).factored()[1] is None


def test_what_is_wrong_with_a_cotangent_is_said():
    u = random_gradient(0, 4, 6)
    assert Entries(u).faults(u, exact=False) == []
    assert Entries(u.astype(jnp.bfloat16)).faults(u, exact=False) == ["it is of dtype bfloat16, expected float32"]
    wrong = Entries(u, bits=8, dtype=u.dtype).faults(u, exact=False)
    assert wrong == ["its levels are float32, expected int8"]
