"""Every backend of every op against float64, over shapes, dtypes, groups and chunk budgets."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import top_k_mask

import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax.formats import Columns, Dense, group_rows, take_columns
from msbp_jax.kernels.choice import dispatch
from msbp_jax.kernels.choice.advice import expected_speed_up, warning
from msbp_jax.kernels.choice.layer import Layer
from msbp_jax.kernels.choice.order import fastest_first
from msbp_jax.kernels.xla import chunks
from msbp_jax.testing import check_backend, dense_products, random_gradient

ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
INTERPRETED = ("gpu", "tpu")  # slow here; test_pallas.py has them
BACKENDS = [(op, name) for op, names in msbp.backends().items() for name in names if name not in INTERPRETED]
BUDGETS = {"xla": [1, 500, 10**9]}  # the others have no chunks
CASES = [(op, backend, budget) for op, backend in BACKENDS for budget in BUDGETS.get(backend, [10**9])]


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted({backend for _, backend in BACKENDS} - {"dense"}))
def test_public_oracle(backend):
    check_backend(backend)


@pytest.mark.parametrize(("op", "backend", "budget"), CASES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "m", "n", "k", "group"), [(12, 6, 20, 3, 1), (10, 5, 33, 7, 4), (9, 8, 16, 15, None)])
def test_against_float64(op, backend, dtype, budget, rows, m, n, k, group, monkeypatch):
    monkeypatch.setattr(chunks, "BUDGET_BYTES", budget)
    u, x, w = (random_gradient(i, *shape).astype(dtype) for i, shape in enumerate([(rows, n), (rows, m), (m, n)]))
    if dtype == "float16" and backend == "native":
        with pytest.raises(NotImplementedError, match="the native kernels take float32 and bfloat16, got float16"):
            kernels.select(u, k, group, backend="native")
        return
    p = kernels.select(u, k, group, backend=backend if op == "select" else "xla")
    if op == "select":
        scores = np.asarray(group_rows(jnp.abs(u).astype(jnp.float32), group).sum(1))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(np.sort(p.index, axis=1), np.sort(best, axis=1))
        np.testing.assert_array_equal(p.values, take_columns(u, p.index, group).values)
    if op == "select_with_memory":
        for memory in (random_gradient(3, 1, n)[0], random_gradient(3, rows, n)):
            padded = u.at[rows - 3 :].set(0)  # rows that take no part
            p, left, live = kernels.select_with_memory(padded, memory, k, group, backend=backend)
            want = np.asarray(padded, np.float32) + np.asarray(memory)
            want[rows - 3 :] = 0
            kept = top_k_mask(want, k, group)
            assert p.values.dtype == dtype
            np.testing.assert_array_equal(p.materialize(), jnp.where(kept, want, 0.0).astype(dtype))
            want_left = np.where(kept, 0, want.astype(np.float64))
            want_left = want_left if memory.ndim == 2 else want_left.sum(0)
            np.testing.assert_allclose(left, want_left, rtol=1e-5, atol=1e-5)
            taking_part = np.arange(rows) < rows - 3
            np.testing.assert_array_equal(live, taking_part[:, None] if memory.ndim == 2 else [taking_part.sum()])
    for axis in (0, 1):
        oriented = w if axis == 1 else w.T
        dx, dw = dense_products(p, x, oriented, axis)
        if op == "grad_input":
            got, want = kernels.grad_input(p, oriented, axis, backend=backend), dx
        elif op == "grad_weight":
            got, want = kernels.grad_weight(p, x, axis, backend=backend), dw
        else:
            assert op in ("select", "select_with_memory")  # looked at above
            continue
        assert got.dtype == jnp.float32  # the accumulator
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_every_op_is_among_the_cases():
    """With a backend that takes any dtype and shape, so that none is there by name only."""
    assert {op for op, backend, _ in CASES if backend == "xla"} == set(kernels.OPS)


@pytest.mark.parametrize("op", ["grad_input", "grad_weight"])
@pytest.mark.parametrize("group", [1, 4, None])
def test_vmap(op, group):
    u, x, w = random_gradient(0, 24, 20), random_gradient(1, 24, 6), random_gradient(2, 12, 20)

    def products(u, x, w):
        p = kernels.select(u, 5, group)
        return kernels.grad_input(p, w, 1) if op == "grad_input" else kernels.grad_weight(p, x, 1)

    parts = u.reshape(2, 12, 20), x.reshape(2, 12, 6), w.reshape(2, 6, 20)
    want = jnp.stack([products(*(part[i] for part in parts)) for i in range(2)])
    np.testing.assert_allclose(jax.vmap(products)(*parts), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 4, 8, None])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "backend", [name for name in msbp.backends()["grad_input"] if name not in ("dense", *INTERPRETED)]
)
def test_no_masked_copy_of_the_cotangent(group, axis, backend):
    """No float intermediate of the two products has the cotangent's shape."""
    rows, m, n, k = 24, 7, 37, 5
    p = kernels.select(random_gradient(0, rows, n), k, group)
    w = jnp.ones((m, n) if axis == 1 else (n, m))

    def products(p, x, w):
        options = {"backend": backend}
        return kernels.grad_input(p, w, axis, **options), kernels.grad_weight(p, x, axis, **options)

    def shapes(jaxpr):
        for eqn in jaxpr.eqns:
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from shapes(inner)
            yield from (v.aval.shape for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))

    found = set(shapes(jax.make_jaxpr(products)(p, jnp.ones((rows, m)), w).jaxpr))
    assert not {(rows, n), (n, rows)} & found
    assert not {s for s in found if len(s) == 3 and s[0] * s[1] == rows and s[2] == n}


def test_nan_and_infinity_are_selected_first():
    u = random_gradient(0, 4, 30).at[1, 9].set(jnp.inf).at[2, 4].set(jnp.nan)
    for _, backend in [b for b in BACKENDS if b[0] == "select"]:
        assert sorted(kernels.select(u, 2, None, backend=backend).index[0].tolist()) == [4, 9]


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    rows=st.integers(1, 9), n=st.integers(1, 12), group=st.sampled_from([1, 2, 3, 7, None]),
    dtype=st.sampled_from(list(ROUNDING)), data=st.data(),
)  # fmt: skip
def test_formats_round_trip(rows, n, group, dtype, data):
    k = data.draw(st.integers(1, n))
    u = random_gradient(data.draw(st.integers(0, 99)), rows, n).astype(dtype)
    p = kernels.select(u, k, group)
    size = min(group or rows, rows)
    assert (p.shape, p.kept_per_group, p.rows_per_group) == ((rows, n), k, size)
    assert p.index.shape == (-(-rows // size), k)
    kept = np.asarray(p.kept_columns())
    assert (kept.sum(1) == k).all()
    dense = np.asarray(p.materialize())
    mask = np.repeat(kept, size, axis=0)[:rows]
    np.testing.assert_array_equal(dense, np.where(mask, np.asarray(u), np.zeros((), dense.dtype)))
    assert p.astype(jnp.float32).values.dtype == jnp.float32
    if k == n:
        np.testing.assert_array_equal(dense, u)


def test_dense_format():
    u = random_gradient(0, 3, 4)
    p = Dense(u)
    assert p.shape == (3, 4)
    assert p.materialize() is u
    assert p.astype(jnp.bfloat16).values.dtype == jnp.bfloat16
    assert isinstance(jax.tree.map(lambda a: a, take_columns(u, jnp.zeros((1, 1), jnp.int32), None)), Columns)


def testchunks():
    assert chunks.groups_at_once(10, 1) == 10
    assert chunks.groups_at_once(10, chunks.BUDGET_BYTES // 3) == 3  # four chunks of three, the last of one
    assert chunks.groups_at_once(4, 10 * chunks.BUDGET_BYTES) == 1


def declines(*_):
    raise NotImplementedError("not on this chip")


def faulty(*_):
    raise ValueError("bad input")


def test_dispatch():
    assert dispatch.run("op", {"a": declines, "b": lambda x: x + 1}, None, 1) == 2
    with pytest.raises(ValueError, match="bad input"):
        dispatch.run("op", {"a": faulty, "b": lambda x: x}, None, 1)
    with pytest.raises(NotImplementedError, match="not on this chip"):
        dispatch.run("op", {"a": declines, "b": lambda x: x}, "a", 1)
    with pytest.raises(ValueError, match=r"op has no backend 'c'\. Expected one of: a, b; or None"):
        dispatch.run("op", {"a": declines, "b": declines}, "c", 1)
    with pytest.raises(ExceptionGroup, match="every backend of op declined") as caught:
        dispatch.run("op", {"a": declines, "b": declines}, None, 1)
    assert [str(e) for e in caught.value.exceptions] == ["not on this chip"] * 2
    with pytest.raises(ExceptionGroup) as caught:
        dispatch.run("op", {}, None, 1)
    assert "it has no backend" in str(caught.value.exceptions[0])


RESULTS = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks/results/results.json").read_text())
CHOICES = RESULTS["choice"]["rows"]


def layer_of(row):
    return Layer(row["rows"], row["in"], row["out"], row["k"], row["r"])


@pytest.mark.skipif("native" not in msbp.backends()["select"], reason="the native kernels were not built")
def test_the_choice_is_within_15_percent_of_the_best():
    """On the recorded grid: whatever the cost model takes, at densities that anybody trains with."""
    worse = {}
    for row in CHOICES:
        times = {name: row[f"{name}_ms"] for name in ("native", "xla", "dense") if f"{name}_ms" in row}
        chosen = next(name for name in fastest_first(layer_of(row)) if name in times)
        if row["k"] <= 0.25 * row["out"] + 1:
            best = min(times.values())
            worse[layer_of(row)] = max(1, (times[chosen] - 0.06) / best) if times[chosen] > 1.15 * best else 1
    assert len(worse) > 100
    assert max(worse.values()) <= 1.15, [layer for layer, ratio in worse.items() if ratio > 1.15]


@pytest.mark.skipif("native" not in msbp.backends()["select"], reason="the native kernels were not built")
def test_the_expected_speed_up_tells_faster_from_slower():
    measured = np.array([row["dense/sparse"] for row in CHOICES])
    expected = np.array([expected_speed_up(layer_of(row)) for row in CHOICES])
    assert np.median(np.abs(np.log(expected / measured))) < np.log(1.5)
    slow_enough = np.array([row["plain_ms"] > 0.3 for row in CHOICES])  # to be told from the cost of a call
    clear = ((measured > 2) | (measured < 0.5)) & slow_enough
    assert ((expected > 1) == (measured > 1))[clear].all()


def test_warnings():
    assert warning(Layer(1024, 1024, 1024, 41, 128)) == ""
    text = warning(Layer(1024, 1024, 1024, 1000, 1))
    assert "probably slower than the dense one here" in text
    assert "its products run dense, on the sparse gradient, as no sparse path would be faster" in text
    slow = warning(Layer(1024, 1024, 1024, 41, 1), "xla")
    assert "rows_per_group=32 or more is faster" in slow
    assert "better left dense" in warning(Layer(32, 64, 64, 60, 32), "xla")
