"""The native kernels: instruction sets, transformations, determinism, bad input, and the package without them."""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax.formats import Columns
from msbp_jax.kernels.native import calls
from msbp_jax.testing import dense_products, random_gradient

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def test_they_are_built_where_there_is_a_compiler():
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    assert calls.available(), "installation fell back to XLA: look at the output of pip install -v ."


native = pytest.mark.skipif(not calls.available(), reason="the native kernels were not built")


def backward(u, x, w, k, group, backend="native"):
    p = kernels.select(u, k, group, backend=backend)
    return kernels.grad_input(p, w, 1, backend=backend), kernels.grad_weight(p, x, 1, backend=backend)


@pytest.mark.slow
@native
@pytest.mark.parametrize("number", range(len(calls.instruction_sets())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "m", "n", "k", "group"),
    [
        (40, 70, 100, 9, 1),
        (300, 129, 500, 20, 10),
        (130, 65, 1500, 70, 64),
        (1100, 33, 90, 8, 1),
        (200, 40, 64, 3, 200),
    ],
)
def test_every_instruction_set(number, dtype, rows, m, n, k, group):
    u, x, w = (random_gradient(i, *shape).astype(dtype) for i, shape in enumerate([(rows, n), (rows, m), (m, n)]))
    groups, f32 = -(-rows // group), jnp.float32
    select = {"instruction_set": number, "k": k, "rows_per_group": group}
    results = [((groups, group, k), u.dtype), ((groups, k), jnp.int32)]
    p = Columns(*calls.call("select", [u], results, **select), (rows, n))
    want = kernels.select(u, k, group, backend="xla")
    np.testing.assert_array_equal(p.index, np.sort(want.index, axis=1))
    memory = random_gradient(5, 1, n)[0]
    u = u.at[1::3].set(0)  # rows that take no part
    for remembered, by_slot in ((memory, False), (random_gradient(6, rows, n), True)):
        left = [(remembered.shape, f32), ((rows, 1) if by_slot else (1,), f32)]
        _, index, *got = calls.call("select_with_memory", [u, remembered], [*results, *left], by_slot=by_slot, **select)
        want, *want_left = kernels.select_with_memory(u, remembered, k, group, backend="xla")
        live = np.asarray(u).any(1).reshape(-1, group).any(1) if rows % group == 0 else np.ones(groups, bool)
        np.testing.assert_array_equal(index[live], np.sort(want.index, axis=1)[live])
        np.testing.assert_allclose(got[0], want_left[0], rtol=1e-4, atol=1e-5 * (1 if by_slot else rows))
        np.testing.assert_array_equal(got[1], want_left[1])
    for axis in (0, 1):
        oriented = w if axis == 1 else w.T
        options = {"features_last": axis == 1, "instruction_set": number}
        (dx,) = calls.call("grad_input", [p.values, p.index, oriented], [((rows, m), f32)], **options)
        (dw,) = calls.call("grad_weight", [p.values, p.index, x], [(oriented.shape, f32)], **options)
        for got, want_product in zip((dx, dw), dense_products(p, x, oriented, axis), strict=True):
            np.testing.assert_allclose(got, want_product, rtol=0, atol=1e-5 * np.abs(want_product).max())


@pytest.mark.slow
@native
@pytest.mark.parametrize("group", [1, 4, 12, None])
def test_transformations_keep_the_bits(group):
    us, xs, ws = random_gradient(0, 36, 80), random_gradient(1, 36, 20), random_gradient(2, 60, 80)
    us, xs, ws = us.reshape(3, 12, 80), xs.reshape(3, 12, 20), ws.reshape(3, 20, 80)
    one = lambda u, x, w: backward(u, x, w, 7, group)
    want = [jnp.stack(parts) for parts in zip(*(one(us[i], xs[i], ws[i]) for i in range(3)), strict=True)]
    for got in (
        jax.vmap(one)(us, xs, ws),
        jax.lax.map(lambda a: one(*a), (us, xs, ws)),
        jax.vmap(jax.checkpoint(one))(us, xs, ws),
        jax.tree.map(lambda a: a[0], jax.vmap(jax.vmap(one))(us[None], xs[None], ws[None])),
    ):
        jax.tree.map(np.testing.assert_array_equal, list(got), want)
    shared = jax.vmap(one, in_axes=(0, 0, None))(us, xs, ws[0])
    np.testing.assert_array_equal(shared[0][2], one(us[2], xs[2], ws[0])[0])


@native
def test_memory_under_vmap():
    g, memory = random_gradient(0, 24, 40).reshape(2, 12, 40), random_gradient(1, 2, 40)
    call = lambda g, m: kernels.select_with_memory(g, m, 5, 4, backend="native")
    got = jax.vmap(call)(g, memory)
    for i in range(2):
        want = call(g[i], memory[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), got, want)
    shared = jax.vmap(call, in_axes=(0, None))(g, memory[0])
    np.testing.assert_array_equal(shared[1][1], call(g[1], memory[0])[1])


@native
def test_shard_map_communicates_nothing():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    u, x, w = random_gradient(0, 64, 80), random_gradient(1, 64, 20), random_gradient(2, 20, 80)
    rows, whole = PartitionSpec("rows"), PartitionSpec()

    def local(u, x, w):
        dx, dw = backward(u, x, w, 7, 4)
        assert jax.typeof(dx).manual_axis_type.varying == {"rows"}
        return dx, dw[None]

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, whole), out_specs=(rows, rows)))
    arguments = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((u, rows), (x, rows), (w, whole))]
    dx, dw = mapped(*arguments)
    want_dx, want_dw = backward(u, x, w, 7, 4)
    np.testing.assert_array_equal(dx, want_dx)
    np.testing.assert_allclose(dw.sum(0), want_dw, rtol=1e-4, atol=1e-4)
    text = mapped.lower(*arguments).compile().as_text()
    assert "msbp_grad_weight" in text
    assert not any(word in text for word in COLLECTIVES)


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.slow
@native
@pytest.mark.parametrize("group", [1, 4, 8, 16, 5, None])
@pytest.mark.parametrize("by_slot", [False, True])
def test_rows_sharded_under_jit_stay_where_they_are(group, by_slot):
    """Where groups go evenly into the devices, dw and the memory are summed over them, and nothing is gathered."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    u, x, w = random_gradient(0, 64, 80), random_gradient(1, 64, 20), random_gradient(2, 20, 80)
    memory = random_gradient(3, 64, 80) if by_slot else random_gradient(3, 1, 80)[0]
    rows, whole = PartitionSpec("rows"), PartitionSpec()

    @jax.jit
    def step(u, x, w, memory):
        p, after, live = kernels.select_with_memory(u, memory, 7, group, backend="native")
        dx, dw = kernels.grad_input(p, w, 1, backend="native"), kernels.grad_weight(p, x, 1, backend="native")
        return dx, dw, after, live, kernels.select(u, 7, group, backend="native").values

    placed = (u, rows), (x, rows), (w, whole), (memory, rows if by_slot else whole)
    spread = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in placed]
    for got, want in zip(step(*spread), step(u, x, w, memory), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    text = step.lower(*spread).compile().as_text()
    found = {word for word in COLLECTIVES if word in text}
    assert found == ({"all-reduce"} if group in (1, 4, 8, None) else {"all-gather"})


@native
def test_blocks_of_rows_that_choose_for_themselves_need_nothing_from_one_another():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    u, memory = random_gradient(0, 64, 80).reshape(8, 8, 80), random_gradient(3, 8, 80)
    spread = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("rows"))) for a in (u, memory)]
    step = jax.jit(jax.vmap(lambda u, m: kernels.select_with_memory(u, m, 7, None, backend="native")))
    for got, want in zip(jax.tree.leaves(step(*spread)), jax.tree.leaves(step(u, memory)), strict=True):
        np.testing.assert_array_equal(got, want)
    text = step.lower(*spread).compile().as_text()
    assert not any(word in text for word in COLLECTIVES)


HASH = """
import os, sys
os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[1].split(",")})
import hashlib, jax, jax.numpy as jnp, numpy as np
import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax.testing import random_gradient
digest = hashlib.sha256()
for rows, m, n, k, group in ((300, 200, 700, 31, 1), (300, 200, 700, 31, 16), (300, 200, 700, 31, None)):
    u, x, w = random_gradient(0, rows, n), random_gradient(1, rows, m), random_gradient(2, m, n)
    p, *memory = kernels.select_with_memory(u, random_gradient(3, 1, n)[0], k, group, backend="native")
    out = kernels.grad_input(p, w, 1, backend="native"), kernels.grad_weight(p, x, 1, backend="native")
    made = kernels.dither(u, jnp.array([1, 2], jnp.uint32), jnp.float32(2), backend="native")
    rows_kept = jnp.asarray(np.arange(rows) % 3, jnp.float32)
    for q in (msbp.Entries(made[0]), msbp.Rows(u, rows_kept)):
        out += kernels.grad_input(q, w, 1, backend="native"), kernels.grad_weight(q, x, 1, backend="native")
    for leaf in jax.tree.leaves((p, memory, out, made, kernels.spread(u, backend="native"))):
        digest.update(np.asarray(leaf).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
@native
def test_the_same_bits_for_any_number_of_threads():
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one processor")
    found = set()
    for chosen in (cpus[:1], cpus):
        command = [sys.executable, "-c", HASH, ",".join(map(str, chosen))]
        found.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert len(found) == 1
    assert len(found.pop()) == hashlib.sha256().digest_size * 2


@pytest.mark.slow
def test_without_them_xla_serves():
    code = (
        "import sys; sys.modules['msbp_jax.kernels._native'] = None\n"
        "import jax.numpy as jnp, msbp_jax as msbp\n"
        "print(msbp.backends()['grad_input'], msbp.backends()['select'])\n"
        "f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=8, rows_per_group=None))\n"
        "print(f.report(jnp.ones((512, 512)), jnp.ones((128, 512))))\n"
        "narrow = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=8))\n"
        "print('without rows:', narrow.report(jnp.ones((8, 64)), jnp.ones((0, 8))).sparse[0].warning or 'none')\n"
        "try:\n"
        "    msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=8), backend='native')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "('gpu', 'tpu', 'xla', 'dense') ('gpu', 'tpu', 'xla')" in out
    assert "The native CPU kernels were not built" in out
    assert "without rows: none" in out
    assert "There is no backend 'native'" in out
    assert "or None to choose. The native CPU kernels were not built" in out


@native
def test_the_compiled_program_holds_what_the_report_says():
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=8, rows_per_group=16), decay=0.5))
    w, x = jnp.ones((128, 256)), jnp.ones((64, 128))
    loss = lambda w, m, x: (f(w, x, memory=m) ** 2).mean()
    lowered = jax.jit(msbp.value_and_grad(loss)).lower(w, f.init_memory(w, x), x).as_text()
    assert f.report(w, x).sparse[0].backend == "native"
    for name in ("msbp_select_with_memory", "msbp_grad_weight"):
        assert name in lowered
    forced = msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=8, rows_per_group=16), backend="xla")
    text = jax.jit(msbp.value_and_grad(lambda w, m, x: (forced(w, x, memory=m) ** 2).mean()))
    assert "msbp_" not in text.lower(w, forced.init_memory(w, x), x).as_text()
    assert forced.report(w, x).sparse[0].backend == "xla"


@native
def test_arrays_of_other_strides_are_the_same_arrays():
    u, x = np.asarray(random_gradient(0, 40, 24)), np.asarray(random_gradient(1, 24, 6))
    w = np.asarray(random_gradient(2, 12, 40))[::2]
    call = jax.jit(lambda u, x, w: backward(u, x, w, 4, 3))
    strided = call(u.T, x, w)
    plain = call(np.ascontiguousarray(u.T), x, np.ascontiguousarray(w))
    jax.tree.map(np.testing.assert_array_equal, strided, plain)


type Array = tuple[tuple[int, ...], str]  # shape and dtype
RANKS = {
    "select": ([2], [3, 2]),
    "select_with_memory": ([2, 1], [3, 2, 1, 1]),
    "grad_input": ([3, 2, 2], [2]),
    "grad_weight": ([3, 2, 2], [2]),
}


def fits(which: str, operands: list[Array], results: list[Array], numbers: dict[str, int]) -> bool:
    """Whether a call is one that the kernels are written for, said a second time."""
    ranks = [rank + numbers.get("by_slot", 0) * (rank == 1) for rank in itertools.chain(*RANKS[which])]
    arrays = [*operands, *results]
    if any(len(shape) < rank for (shape, _), rank in zip(arrays, ranks, strict=True)):
        return False
    shapes = [shape[len(shape) - rank :] for (shape, _), rank in zip(arrays, ranks, strict=True)]
    batches = [shape[: len(shape) - rank] for (shape, _), rank in zip(arrays, ranks, strict=True)]
    dtypes = [dtype for _, dtype in arrays]
    real = ("float32", "bfloat16")
    if which.startswith("select"):
        whole = batches[len(operands)]
        (rows, n), k, r = shapes[0], numbers["k"], numbers["rows_per_group"]
        alike = (rows, n) if numbers.get("by_slot") else (n,)
        groups = -(-rows // r) if r > 0 else 0
        live = (rows, 1) if numbers.get("by_slot") else (1,)
        wanted = [(rows, n), *[alike] * (len(operands) - 1), (groups, r, k), (groups, k), alike, live][: len(arrays)]
        kinds = ["float32"] * len(arrays)
        kinds[0] = kinds[len(operands)] = dtypes[0]
        kinds[len(operands) + 1] = "int32"
        right = shapes == wanted and dtypes == kinds and dtypes[0] in real
    else:
        (groups, r, k), _, other, out = shapes
        whole, matrix = batches[-1], out if which == "grad_weight" else other
        m, n = matrix if numbers["features_last"] else matrix[::-1]
        rows, rest = (other[0], other) if which == "grad_weight" else (out[0], out)
        right = shapes[1] == (groups, k) and rest == (rows, m) and m > 0 and (r < 1 or groups == -(-rows // r))
        right &= {dtypes[0], dtypes[2]} <= set(real) and (dtypes[1], dtypes[3]) == ("int32", "float32")
    sizes = rows >= 1 and 1 <= k <= n and 1 <= r <= rows
    along = all(len(own) == len(whole) and all(map(_same_or_1, own, whole)) for own in batches)
    return right and sizes and along and 0 <= numbers["instruction_set"] < len(calls.instruction_sets())


def _same_or_1(size: int, whole: int) -> bool:
    return size in (1, whole)


def good_call(draw) -> tuple[str, list[Array], list[Array], dict[str, int]]:
    """Draw a call that fits."""
    rows, n, m = (draw(st.integers(1, 6)) for _ in range(3))
    k, r = draw(st.integers(1, n)), draw(st.integers(1, rows))
    dtype, other = (draw(st.sampled_from(["float32", "bfloat16"])) for _ in range(2))
    last, by_slot = draw(st.booleans()), draw(st.booleans())
    groups, batch = -(-rows // r), draw(st.sampled_from([(), (2,), (1, 3)]))
    which = draw(st.sampled_from(list(RANKS)))
    values, index, weight = (groups, r, k), (groups, k), (m, n) if last else (n, m)
    alike, live = ((rows, n), (rows, 1)) if by_slot else ((n,), (1,))
    kept = [(values, dtype), (index, "int32")]
    numbers = {"instruction_set": draw(st.integers(0, len(calls.instruction_sets()) - 1))}
    match which:
        case "select":
            operands, results = [((rows, n), dtype)], kept
        case "select_with_memory":
            operands = [((rows, n), dtype), (alike, "float32")]
            results = [*kept, (alike, "float32"), (live, "float32")]
            numbers["by_slot"] = by_slot
        case "grad_input":
            operands, results = [*kept, (weight, other)], [((rows, m), "float32")]
        case _:
            operands, results = [*kept, ((rows, m), other)], [(weight, "float32")]
    numbers |= {"k": k, "rows_per_group": r} if which.startswith("select") else {"features_last": last}
    add = lambda arrays: [((*batch, *shape), dtype) for shape, dtype in arrays]
    return which, add(operands), add(results), numbers


def spoil(draw, arrays: list[Array], least: int) -> list[Array]:
    """Change one array: an axis of another size, at least so large, one more, one less, or another dtype."""
    place = draw(st.integers(0, len(arrays) - 1))
    (shape, dtype), sizes = arrays[place], st.integers(least, 7)
    match draw(st.sampled_from(["size", "more", "less", "dtype"])):
        case "dtype":
            dtype = draw(st.sampled_from(["float32", "bfloat16", "int32", "float16"]))
        case "more":
            shape = (draw(sizes), *shape)
        case "less":
            shape = shape[1:]
        case _:
            axis = draw(st.integers(0, len(shape) - 1))
            shape = (*shape[:axis], draw(sizes), *shape[axis + 1 :])
    return [*arrays[:place], (shape, dtype), *arrays[place + 1 :]]


def runs_or_is_refused(which, operands, results, numbers, fits) -> None:
    """Call a handler, which must run what fits and say of all else what must be."""
    arrays = [jnp.zeros(*operand) for operand in operands]
    call = lambda: jax.block_until_ready(calls.call(which, arrays, results, **numbers))
    if fits:
        assert [(a.shape, str(a.dtype)) for a in call()] == results
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"msbp_jax: .* must (be|have) "):
            call()


@pytest.mark.slow
@native
@pytest.mark.parametrize("spoiled", ["nothing", "an operand", "a result", "a number", "all"])
def test_the_handlers_run_what_fits_and_refuse_all_else(spoiled):
    """Whatever shapes, dtypes and numbers arrive: never a crash, and an error that says what must be."""
    fitted = []

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(data=st.data())
    def check(data):
        draw = data.draw
        which, operands, results, numbers = good_call(draw)
        if spoiled in ("an operand", "all"):
            operands = spoil(draw, operands, 0)
        if spoiled in ("a result", "all"):
            results = spoil(draw, results, 1)  # XLA does not run what has no result
        if spoiled in ("a number", "all"):
            name = draw(st.sampled_from(sorted(numbers)))
            numbers[name] = draw(st.integers(-2, 7)) if type(numbers[name]) is int else not numbers[name]
        fitted.append(fits(which, operands, results, numbers))
        runs_or_is_refused(which, operands, results, numbers, fitted[-1])

    check()
    assert all(fitted) if spoiled == "nothing" else not all(fitted)


@native
@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op", ["grad_input", "grad_weight"])
def test_an_index_out_of_range(bad, op):
    p = Columns(jnp.ones((2, 3, 4)), jnp.zeros((2, 4), jnp.int32).at[1, 2].set(bad), (6, 20))
    other = jnp.ones((5, 20)) if op == "grad_input" else jnp.ones((6, 5))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"index must be between 0 and 19, got"):
        jax.block_until_ready(getattr(kernels, op)(p, other, 1, backend="native"))


P = Columns(jnp.ones((2, 3, 4)), jnp.zeros((2, 4), jnp.int32), (6, 20))
X, W, G = jnp.ones((6, 5)), jnp.ones((5, 20)), jnp.ones((6, 20))


@pytest.mark.parametrize("backend", msbp.backends()["grad_input"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: kernels.grad_input.__wrapped__(G, W, 1, backend=b), TypeError, "cotangent must be msbp.Columns"),
        (lambda b: kernels.grad_input(P, W.astype(int), 1, backend=b), TypeError, "weight must be a floating-point"),
        (lambda b: kernels.grad_input(P, W[0], 1, backend=b), ValueError, r"weight must be a matrix .* shape \(20,\)"),
        (lambda b: kernels.grad_input(P, W, 0, backend=b), ValueError, "weight must have the 20 features .* on axis 0"),
        (lambda b: kernels.grad_input(P, W, 2, backend=b), ValueError, "feature_axis must be 0 or 1, got 2"),
        (lambda b: kernels.grad_weight(P, X[:4], 1, backend=b), ValueError, "inputs must have the 6 rows"),
        (lambda b: kernels.grad_weight(P, X[:, :0], 1, backend=b), ValueError, "inputs must be a matrix with at least"),
        (
            lambda b: kernels.grad_weight(Columns(P.values, P.index.astype(jnp.float32), P.shape), X, 1, backend=b),
            TypeError,
            "cotangent.index must have an integer dtype, got float32",
        ),
        (
            lambda b: kernels.grad_weight(Columns(P.values, P.index[:1], P.shape), X, 1, backend=b),
            ValueError,
            r"cotangent.values must be \[G, r, k\] and cotangent.index \[G, k\], got \(2, 3, 4\) and \(1, 4\)",
        ),
        (
            lambda b: kernels.grad_weight(Columns(P.values[..., :0], P.index[:, :0], P.shape), X, 1, backend=b),
            ValueError,
            "cotangent.values must not be empty",
        ),
        (
            lambda b: kernels.grad_weight(Columns(P.values, P.index, (6, 3)), X, 1, backend=b),
            ValueError,
            "keeps 4 columns of a cotangent that has 3",
        ),
        (
            lambda b: kernels.grad_weight(Columns(P.values, P.index, (9, 20)), X, 1, backend=b),
            ValueError,
            "has 2 groups of 3 rows, which does not fit 9 rows",
        ),
    ],
)
def test_bad_arguments_of_the_products(backend, call, error, message):
    with pytest.raises(error, match=message):
        call(backend)


@pytest.mark.parametrize("backend", msbp.backends()["select"])
@pytest.mark.parametrize(
    ("g", "k", "group", "error", "message"),
    [
        (G[0], 3, 1, ValueError, r"cotangent must be a matrix with at least one row and one column, got shape \(20,\)"),
        (G[:0], 3, 1, ValueError, r"cotangent must be a matrix .* got shape \(0, 20\)"),
        (G[:, :0], 3, 1, ValueError, r"cotangent must be a matrix .* got shape \(6, 0\)"),
        (G.astype(int), 3, 1, TypeError, "cotangent must be a floating-point array, got int32"),
        (G, 0, 1, ValueError, "k must be between 1 and the 20 columns of cotangent, got 0"),
        (G, 21, 1, ValueError, "k must be between 1 and the 20 columns of cotangent, got 21"),
        (G, 2.5, 1, TypeError, r"k must be an int, got 2\.5"),
        (G, 2, 0, ValueError, "rows_per_group must be at least 1, or None for one group, got 0"),
        (G, 2, "a", TypeError, "rows_per_group must be an int, got 'a'"),
    ],
)
def test_bad_arguments_of_select(backend, g, k, group, error, message):
    for call in (
        lambda: kernels.select.__wrapped__(g, k, group, backend=backend),
        lambda: kernels.select_with_memory.__wrapped__(g, jnp.zeros(20), k, group, backend=backend),
    ):
        with pytest.raises(error, match=message):
            call()


def test_bad_memory():
    with pytest.raises(ValueError, match=r"memory must have shape \(20,\) \(one for all rows\) or \(6, 20\)"):
        kernels.select_with_memory(G, jnp.zeros(6), 3, 1)
    with pytest.raises(TypeError, match="memory must be a floating-point array, got int32"):
        kernels.select_with_memory.__wrapped__(G, jnp.zeros(20, int), 3, 1)


@native
def test_float64_goes_to_xla():
    with jax.enable_x64(True):
        g = jnp.asarray(np.asarray(random_gradient(0, 6, 20), np.float64))
        assert kernels.select(g, 3, 2).values.dtype == jnp.float64
        with pytest.raises(NotImplementedError, match="the native kernels take float32 and bfloat16, got float64"):
            kernels.select(g, 3, 2, backend="native")
