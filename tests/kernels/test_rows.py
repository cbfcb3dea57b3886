"""The products of `Rows`: every backend against float64, transformations, devices, and what is refused."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from twins import assert_trees_close

from msbp_jax import kernels
from msbp_jax.formats import Rows
from msbp_jax.kernels import live_rows, rows
from msbp_jax.kernels.native import calls
from msbp_jax.kernels.rows import ladder
from msbp_jax.testing import random_gradient

BACKENDS = list(rows.OPS["grad_input"])
PRODUCTS = ["grad_input", "grad_weight"]
native = pytest.mark.skipif(not calls.available(), reason="the native kernels were not built")


def some_rows(seed, rows, n, density, dtype="float32", *, unchanged=False):
    """Return a cotangent of which some rows are kept; of the rest, unless rows are unchanged, nothing may be seen."""
    draw = np.random.default_rng(seed)
    kept = draw.permutation(rows) < round(density * rows)
    weight = np.where(kept, 1 if unchanged else draw.integers(2, 9, rows) / 2, 0)
    values = np.where(kept[:, None], random_gradient(seed, rows, n), 0 if unchanged else np.nan)
    return Rows(jnp.asarray(values).astype(dtype), jnp.asarray(weight, jnp.float32), unchanged=unchanged)


def operands(seed, rows, m, n, axis, dtype="float32"):
    x, w = random_gradient(seed + 1, rows, m).astype(dtype), random_gradient(seed + 2, m, n).astype(dtype)
    return x, w if axis == 1 else w.T


def in_float64(p, x, w, axis):
    """Return dx and dw, of the rows that are kept alone, by NumPy."""
    values, weight, x, w = (np.asarray(a, np.float64) for a in (p.values, p.weight, x, w))
    g = np.where(weight[:, None] != 0, values, 0) * weight[:, None]
    dx, dw = (g @ w.T, x.T @ g) if axis == 1 else (g @ w, g.T @ x)
    return {"grad_input": dx, "grad_weight": dw}


def product(op, p, x, w, axis, **options):
    return getattr(kernels, op)(p, w if op == "grad_input" else x, axis, **options)


# XLA's operands are rows times their weights, rounded to the dtype of the gradient.
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}


def check_against_float64(p, x, w, axis, backend, tolerance=None):
    dtype = "float32" if backend == "native" or p.unchanged else str(p.values.dtype)
    tolerance = tolerance or ROUNDING[dtype]
    for op, want in in_float64(p, x, w, axis).items():
        got = product(op, p, x, w, axis, backend=backend)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=1e-30))


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(
    rows=st.integers(1, 70), m=st.integers(1, 40), n=st.integers(1, 40), axis=st.integers(0, 1),
    density=st.sampled_from([0, 0.05, 0.3, 0.5, 0.9, 1]), unchanged=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]), seed=st.integers(0, 99),
)  # fmt: skip
@hypothesis.settings(max_examples=15)
def test_against_float64(backend, rows, m, n, axis, density, unchanged, dtype, seed):
    p = some_rows(seed, rows, n, density, dtype, unchanged=unchanged)
    check_against_float64(p, *operands(seed, rows, m, n, axis, dtype), axis, backend)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "m", "n"), [(1500, 30, 40), (50, 700, 90), (40, 60, 2300)])
def test_sizes_beyond_one_tile(backend, rows, m, n, axis):
    check_against_float64(some_rows(0, rows, n, 0.7), *operands(0, rows, m, n, axis), axis, backend)


@pytest.mark.parametrize("backend", ["xla", "dense"])
def test_float16(backend):
    check_against_float64(some_rows(0, 40, 20, 0.3, "float16"), *operands(0, 40, 10, 20, 1, "float16"), 1, backend)


def test_float64():
    with jax.enable_x64(True):
        p = some_rows(0, 40, 20, 0.3, "float64")
        x, w = operands(0, 40, 10, 20, 1, "float64")
        check_against_float64(p, x, w, 1, None, tolerance=1e-12)
        if calls.available():
            with pytest.raises(NotImplementedError, match="the native kernels take float32 and bfloat16, got float64"):
                kernels.grad_input(p, w, 1, backend="native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PRODUCTS)
def test_the_result_has_the_dtype_that_is_asked_for(backend, op):
    p = some_rows(0, 12, 5, 0.5, "bfloat16")
    x, w = operands(0, 12, 4, 5, 1, "bfloat16")
    assert product(op, p, x, w, 1, backend=backend).dtype == jnp.float32
    assert product(op, p, x, w, 1, backend=backend, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_two_dtypes(backend):
    p, (x, w) = some_rows(0, 40, 20, 0.3), operands(0, 40, 10, 20, 1, "bfloat16")
    check_against_float64(p, x, w, 1, backend)
    x, w = operands(0, 40, 10, 20, 1)
    check_against_float64(p.astype(jnp.bfloat16), x, w, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_members_that_keep_different_numbers_of_rows(backend, op, shared):
    members = [some_rows(seed, 48, 20, density) for seed, density in enumerate([0, 0.1, 0.4, 1])]
    x, w = operands(0, 48, 10, 20, 1)
    xs, ws = (a if shared else jnp.stack([a, 2 * a, 3 * a, 4 * a]) for a in (x, w))
    call = lambda p, x, w: product(op, p, x, w, 1, backend=backend)
    got = jax.jit(jax.vmap(call, in_axes=(0, None, None) if shared else 0))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), xs, ws
    )
    each = [call(p, *(a if shared else a[i] for a in (xs, ws))) for i, p in enumerate(members)]
    assert_trees_close(got, jnp.stack(each), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_over_steps_that_keep_different_numbers_of_rows(backend):
    members = [some_rows(seed, 48, 20, density) for seed, density in enumerate([0, 0.1, 0.4, 1])]
    x, _ = operands(0, 48, 10, 20, 1)
    step = lambda total, p: (total + kernels.grad_weight(p, x, 1, backend=backend), None)
    got, _ = jax.lax.scan(step, jnp.zeros((10, 20)), jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    assert_trees_close(got, sum(kernels.grad_weight(p, x, 1, backend=backend) for p in members), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_rows_over_eight_devices(backend, op, density):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    p, (x, w) = some_rows(0, 64, 20, density), operands(0, 64, 10, 20, 1)
    call = jax.jit(lambda p, x, w: product(op, p, x, w, 1, backend=backend))
    spread = jax.device_put((p, x), NamedSharding(mesh, PartitionSpec("rows")))
    assert_trees_close(call(*spread, w), call(p, x, w), rtol=1e-5)


@native
def test_native_products_gather_no_rows_from_other_devices():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("rows"))
    p, x = jax.device_put((some_rows(0, 64, 20, 0.3), operands(0, 64, 10, 20, 1)[0]), spread)
    text = jax.jit(lambda p, x: kernels.grad_weight(p, x, 1, backend="native")).lower(p, x).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


@native
def test_the_bits_are_the_same_under_jit_vmap_and_remat():
    p, (x, w) = some_rows(0, 48, 20, 0.4), operands(0, 48, 10, 20, 1)
    call = lambda p, x, w: [product(op, p, x, w, 1, backend="native") for op in PRODUCTS]
    want = call(p, x, w)
    one = jax.tree.map(lambda a: a[None], (p, x, w))
    for got in (jax.jit(call)(p, x, w), jax.checkpoint(call)(p, x, w)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), jax.vmap(call)(*one), want)


ENTRIES = [1.0, -2.5, np.nan, np.inf, 1e-39, -1e-39]  # the last two are too small for XLA's arithmetic


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 3, 16, 37])
def test_live_rows(dtype, n):
    u = np.where(np.arange(20 * n).reshape(20, n) % 2, 0.0, -0.0).astype(np.float32)
    entries = ENTRIES if dtype != "float16" else ENTRIES[:4]
    for number, entry in enumerate(entries):
        u[2 * number, number % n] = entry
    u = jnp.asarray(u).astype(dtype)
    want = np.isin(np.arange(20), 2 * np.arange(len(entries))).astype(np.float32)
    for backend in ("xla", None) if dtype == "float16" or not calls.available() else ("native", "xla", None):
        got = live_rows(u, backend=backend)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


@native
def test_live_rows_under_vmap_and_over_devices():
    u = random_gradient(0, 64, 5).at[::3].set(0)
    want = live_rows(u)
    np.testing.assert_array_equal(jax.vmap(live_rows)(u.reshape(4, 16, 5)).ravel(), want)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    call = jax.jit(lambda u: live_rows(u, backend="native"))
    spread = jax.device_put(u, NamedSharding(mesh, PartitionSpec("rows")))
    np.testing.assert_array_equal(call(spread), want)
    assert "all-" not in call.lower(spread).compile().as_text()


@native
@pytest.mark.parametrize("number", range(len(calls.instruction_sets())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "m", "n"), [(40, 70, 100), (300, 129, 37), (7, 5, 1500)])
def test_every_instruction_set(number, dtype, rows, m, n):
    p = some_rows(0, rows, n, 0.4, dtype)
    (live,) = calls.call("live_rows", [p.values], [((rows,), jnp.float32)], instruction_set=number)
    np.testing.assert_array_equal(live, np.ones(rows))
    for axis in (0, 1):
        x, w = operands(0, rows, m, n, axis, dtype)
        options = {"features_last": axis == 1, "instruction_set": number}
        (dx,) = calls.call("rows_grad_input", [p.values, p.weight, w], [((rows, m), jnp.float32)], **options)
        (dw,) = calls.call("rows_grad_weight", [p.values, p.weight, x], [(w.shape, jnp.float32)], **options)
        for got, want in zip((dx, dw), in_float64(p, x, w, axis).values(), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


F32 = jnp.float32
VALUES, WEIGHT, X, W = jnp.ones((6, 20)), jnp.ones(6), jnp.ones((6, 5)), jnp.ones((5, 20))


@native
@pytest.mark.parametrize(
    ("name", "arrays", "result"),
    [
        ("live_rows", [VALUES[0]], (6,)),
        ("live_rows", [VALUES], (7,)),
        ("live_rows", [VALUES.astype(jnp.float16)], (6,)),
        ("live_rows", [VALUES[:, :0]], (6,)),
        ("rows_grad_input", [VALUES, WEIGHT[:5], W], (6, 5)),
        ("rows_grad_input", [VALUES, WEIGHT.astype(jnp.bfloat16), W], (6, 5)),
        ("rows_grad_input", [VALUES, WEIGHT, W.T], (6, 5)),
        ("rows_grad_input", [VALUES, WEIGHT, W[0]], (6, 5)),
        ("rows_grad_input", [VALUES, WEIGHT, W], (5, 5)),
        ("rows_grad_weight", [VALUES, WEIGHT, X[:5]], (5, 20)),
        ("rows_grad_weight", [VALUES, WEIGHT, X], (20, 5)),
        ("rows_grad_weight", [VALUES.astype(int), WEIGHT, X], (5, 20)),
        ("rows_grad_weight", [VALUES[:0], WEIGHT[:0], X[:0]], (5, 20)),
    ],
)
def test_handlers_refuse_what_does_not_fit(name, arrays, result):
    options = {} if name == "live_rows" else {"features_last": True}
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"msbp_jax: .* must (be|have) "):
        jax.block_until_ready(calls.call(name, arrays, [(result, F32)], **options))


@native
@pytest.mark.parametrize("number", [-1, 9])
def test_handlers_refuse_an_unknown_instruction_set(number):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"msbp_jax: .* must (be|have) "):
        jax.block_until_ready(calls.call("live_rows", [VALUES], [((6,), F32)], instruction_set=number))


P = Rows(VALUES, WEIGHT)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: kernels.grad_input(P, W[0], 1, backend=b), ValueError, r"weight must be a matrix .* shape \(20,\)"),
        (lambda b: kernels.grad_input(P, W, 0, backend=b), ValueError, "weight must have the 20 features .* on axis 0"),
        (lambda b: kernels.grad_input(P, W, 2, backend=b), ValueError, "feature_axis must be 0 or 1, got 2"),
        (lambda b: kernels.grad_input(P, W.astype(int), 1, backend=b), TypeError, "weight must be a floating-point"),
        (lambda b: kernels.grad_weight(P, X[:4], 1, backend=b), ValueError, "inputs must have the 6 rows"),
        (
            lambda b: kernels.grad_weight(Rows(VALUES, WEIGHT[:4]), X, 1, backend=b),
            ValueError,
            r"cotangent.values must be \[rows, n\] and cotangent.weight \[rows\], got \(6, 20\) and \(4,\)",
        ),
        (
            lambda b: kernels.grad_weight(Rows(VALUES, WEIGHT.astype(int)), X, 1, backend=b),
            TypeError,
            "cotangent.weight must be a floating-point array, got int32",
        ),
    ],
)
def test_bad_arguments(backend, call, error, message):
    with pytest.raises(error, match=message):
        call(backend)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"grad_input has no backend 'cuda'\. Expected one of: "):
        kernels.grad_input(P, W, 1, backend="cuda")


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_backends_that_gather_columns_leave_rows_to_xla(backend):
    np.testing.assert_array_equal(
        kernels.grad_input(P, W, 1, backend=backend), kernels.grad_input(P, W, 1, backend="xla")
    )


@pytest.mark.parametrize("rows", [1, 8, 9, 17, 64, 1000, 4096])
def test_rungs_ascend_and_stay_below_all_rows(rows):
    rungs = ladder.rungs(rows)
    assert rungs == sorted(set(rungs))
    assert all(0 < rung < rows and rung % 8 == 0 for rung in rungs)
    assert bool(rungs) == (rows > 8)
    assert rows < 1000 or len(rungs) == len(ladder.SHARES)


@pytest.mark.parametrize("count", [0, 1, 8, 9, 16, 17, 47, 48, 49, 64])
def test_the_lowest_rung_that_holds_the_rows(count):
    """On either side of every rung, of 8, 16, 24, 32 and 48 rows here."""
    p = some_rows(3, 64, 20, count / 64)
    assert int((p.weight != 0).sum()) == count
    check_against_float64(p, *operands(3, 64, 10, 20, 1), 1, "xla")


def test_kept_rows_come_first():
    p = Rows(jnp.ones((6, 1)), jnp.asarray([0.0, 2, 0, 1, 0, 3]))
    order, count = ladder.kept_first(p)
    np.testing.assert_array_equal(order, [1, 3, 5, 0, 2, 4])
    assert int(count) == 3


def test_under_vmap_the_ladder_is_climbed_once_for_all():
    """A switch on a number of each member's own would become a select, and run every rung."""
    members = [some_rows(seed, 48, 20, density) for seed, density in enumerate([0.1, 0.4])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    x, _ = operands(0, 48, 10, 20, 1)
    text = str(jax.make_jaxpr(jax.vmap(lambda p: kernels.grad_weight(p, x, 1, backend="xla")))(stacked))
    assert "cond[" in text


def test_the_format():
    p = some_rows(0, 12, 5, 0.5)
    assert p.shape == (12, 5)
    assert float(p.share_when_run()) == 0.5
    assert not np.isnan(p.materialize()).any()
    assert p.astype(jnp.bfloat16).values.dtype == jnp.bfloat16
    assert p.describe() == "rows"
    assert dataclasses.replace(p, unchanged=True).describe() == "rows that are not 0"
    quarter = dataclasses.replace(p, share=0.25)
    assert (quarter.describe(), quarter.kept_share(), p.kept_share()) == ("0.25 of the rows", 0.25, None)
