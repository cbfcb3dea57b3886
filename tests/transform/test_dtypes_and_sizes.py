"""Contractions of every dtype are in the report, and sites of more entries than 32 bits number can be traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import msbp_jax as msbp

S = msbp.memorized(msbp.top_k(density=0.05, rows_per_group=32), decay=0.8)
X = jax.random.normal(jax.random.key(0), (6, 8))


def cplx(*shape, seed=1):
    re, im = jax.random.normal(jax.random.key(seed), (2, *shape))
    return lax.complex(re, im)


def fft_layer(p, x):
    """A layer in the frequency domain, as Fourier neural operators have it, between two real ones."""
    h = jnp.fft.rfft(x @ p["into"], axis=1)
    return jnp.fft.irfft(jnp.einsum("bk,kl->bl", h, p["spectral"]), n=64, axis=1) @ p["out"]


FFT = {"into": jnp.ones((8, 126)) / 8, "spectral": cplx(64, 33) / 8, "out": jnp.ones((64, 70))}
COMPLEX = {
    "complex weight, real data": (lambda p, x: (x.astype(jnp.complex64) @ p["w"]).real, {"w": cplx(8, 64)}),
    "batched": (
        lambda p, x: jnp.abs(jnp.einsum("bi,gio->gbo", x.astype(jnp.complex64), p["w"])),
        {"w": cplx(3, 8, 64)},
    ),
    "convolution": (
        lambda p, x: (
            lax.conv_general_dilated(
                x.astype(jnp.complex64)[:, None], p["w"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
            ).real
        ),
        {"w": cplx(64, 1, 3)},
    ),
    "in a scan": (
        lambda p, x: lax.scan(lambda h, w: (h @ w, None), jnp.tile(x, (1, 8)).astype(jnp.complex64), p["w"])[0].real,
        {"w": cplx(3, 64, 64)},
    ),
    "spectral layer": (fft_layer, FFT),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPLEX)
def test_complex_contractions_are_dense_and_in_the_report(case):
    function, params = COMPLEX[case]
    f = msbp.sparse_vjp(function, {"*": S})
    real_too = case == "spectral layer"
    if real_too:
        memory = f.init_memory(params, X)
        assert set(memory) == {"into", "out"}
    else:
        with pytest.warns(UserWarning, match=r"Nothing is sparse under this plan\. .*complex"):
            memory = f.init_memory(params, X)
        assert memory == {}
    report = f.report(params, X)
    assert {row.name for row in report.sparse} == set(memory)
    (row,) = report.dense
    assert row.name == ("spectral" if real_too else "w")
    assert "complex" in row.reason
    assert "complex" in str(report)
    loss = lambda call: lambda p: (call(p) ** 2).mean()
    plain = jax.value_and_grad(loss(lambda p: function(p, X)))(params)
    if not real_too:
        got = msbp.value_and_grad(lambda p, m: loss(lambda p: f(p, X, memory=m))(p))(params, memory)[:2]
        jax.tree.map(np.testing.assert_array_equal, got, plain)


def test_integer_and_boolean_contractions_are_in_the_report():
    """Products without a derivative are dense, and say so."""

    def function(p, x):
        codes = x.astype(jnp.int8) @ p["codes"]
        counts = (x > 0).astype(jnp.int32) @ p["counts"]
        return x @ p["w"] + codes.astype(jnp.float32) + counts.astype(jnp.float32)

    params = {"codes": jnp.ones((8, 64), jnp.int8), "counts": jnp.ones((8, 64), jnp.int32), "w": jnp.ones((8, 64))}
    f = msbp.sparse_vjp(function, S)
    assert set(f.init_memory(params, X)) == {"w"}
    report = f.report(params, X)
    dense = {row.name: row.reason for row in report.dense}
    assert set(dense) == {"codes", "counts"}
    assert all("int" in reason for reason in dense.values())


BIG = {
    "logits, 2^31 entries": (16_384, 131_072),
    "logits, beyond 2^31": (20_000, 131_072),
    "logits, beyond 2^32": (50_000, 131_072),
    "one row of 2^31 features": (1, 2**31 - 1),
    "2^31 rows": (2**31 - 1, 64),
    "beyond 2^32 rows and features": (70_000, 70_000),
}
SPARSIFIERS = {
    "top_k": msbp.top_k(density=0.05, rows_per_group=32),
    "top_k r=1": msbp.top_k(k=8),
    "top_k whole": msbp.top_k(k=8, rows_per_group=None),
    "mean": msbp.memorized(msbp.top_k(k=8, rows_per_group=32), 0.8),
    "slot": msbp.memorized(msbp.top_k(k=8), 0.8, reduce="slot"),
    "local": msbp.memorized(msbp.top_k(k=8), 0.8, reduce="local", shards=1),
    "random_k": msbp.random_k(k=8, rows_per_group=None, rescale=True),
    "memorized random_k": msbp.memorized(msbp.random_k(k=8, rows_per_group=None), 0.8),
}


# Every sparsifier with every size, on the backends by turns.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "name", "backend"),
    [(b, s, ("xla", None)[(i + j) % 2]) for i, b in enumerate(BIG) for j, s in enumerate(SPARSIFIERS)],
)
def test_a_step_of_more_entries_than_32_bits_number(size, name, backend):
    """Abstractly: shapes and dtypes of the whole step, of the report and of the memory, without an array."""
    (rows, features), sparsifier = BIG[size], SPARSIFIERS[name]
    w = jax.ShapeDtypeStruct((8, features), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((rows, 8), jnp.bfloat16)
    f = msbp.sparse_vjp(lambda w, x: x @ w, sparsifier, backend=backend)
    memory = jax.eval_shape(f.init_memory, w, x)
    step = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).astype(jnp.float32).mean())
    loss, grads, after = jax.eval_shape(step, w, memory, x)
    assert (loss.shape, grads.shape, grads.dtype) == ((), w.shape, w.dtype)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), memory)
    report = f.report(w, x)
    assert 0 <= report.saved <= 1
    assert len(report.sparse) == 1
    jax.eval_shape(msbp.diagnose(lambda w, m, x: f(w, x, memory=m).astype(jnp.float32).mean()), w, memory, x)


@pytest.mark.parametrize("side", [2**15, 2**16])
def test_a_convolution_of_more_entries_than_32_bits_number(side):
    x = jax.ShapeDtypeStruct((2, side, side, 1), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((3, 3, 1, 64), jnp.bfloat16)
    conv = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    f = msbp.sparse_vjp(conv, S)
    memory = jax.eval_shape(f.init_memory, w, x)
    step = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).astype(jnp.float32).mean())
    assert jax.eval_shape(step, w, memory, x)[1].shape == w.shape
    (row,) = f.report(w, x).sparse
    assert (row.rows, row.n) == (2 * side**2, 64)
    assert "params" in str(f.report(w, x))


def test_a_scan_and_a_vmap_of_them():
    w = jax.ShapeDtypeStruct((8, 131_072), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, 16_384, 8), jnp.bfloat16)
    for loop in (lambda w, x: lax.map(lambda x: x @ w, x), lambda w, x: jax.vmap(lambda x: x @ w)(x)):
        f = msbp.sparse_vjp(loop, S)
        memory = jax.eval_shape(f.init_memory, w, x)
        step = msbp.value_and_grad(lambda w, m, x, f=f: f(w, x, memory=m).astype(jnp.float32).mean())
        assert jax.eval_shape(step, w, memory, x)[1].shape == w.shape
        assert (
            jax.eval_shape(
                msbp.value_and_grad(lambda w, m, x, f=f: f(w, x, memory=m).astype(jnp.float32).mean(), microbatches=2),
                w,
                memory,
                x,
            )[1].shape
            == w.shape
        )
