"""A format, a sparsifier that makes it, and its products, written outside of the package: everything works with it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax.testing import check_sparsifier, written_out

W = jax.random.normal(jax.random.key(0), (8, 64)) / 3
X = jax.random.normal(jax.random.key(1), (12, 8))
calls = []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FewRows(msbp.Format):
    """Some rows of the cotangent, the others 0."""

    values: jax.Array  # [k, n]
    which: jax.Array  # [k]
    shape: tuple = dataclasses.field(metadata={"static": True})

    def materialize(self):
        return jnp.zeros(self.shape, self.values.dtype).at[self.which].set(self.values)

    def astype(self, dtype):
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def kept_share(self):
        return self.values.shape[-2] / self.shape[0]

    def describe(self):
        return f"{self.values.shape[-2]} of {self.shape[0]} rows"

    def grad_input(self, weight, feature_axis, *, precision, dtype, backend):
        calls.append("dx")
        few = jnp.matmul(self.values, weight.T if feature_axis == 1 else weight, precision=precision)
        return jnp.zeros((self.shape[0], few.shape[1]), dtype).at[self.which].set(few.astype(dtype))

    def grad_weight(self, inputs, feature_axis, *, precision, dtype, backend):
        calls.append("dw")
        dw = jnp.matmul(inputs[self.which].T, self.values, precision=precision).astype(dtype)
        return dw if feature_axis == 1 else dw.T


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signs(msbp.Format):
    """Signs with one size for all: it says nothing of products, which are made from the matrix."""

    signs: jax.Array
    size: jax.Array

    @property
    def shape(self):
        return self.signs.shape

    def materialize(self):
        return self.signs.astype(self.size.dtype) * self.size

    def astype(self, dtype):
        return dataclasses.replace(self, size=self.size.astype(dtype))


def kept_rows(u, k):
    return lax.top_k(jnp.abs(u).sum(axis=1), min(k, u.shape[0]))[1]


def largest_rows(k):
    def apply(u, state):
        which = kept_rows(u, k)
        return FewRows(u[which], which, u.shape), state

    return msbp.Sparsifier(init=lambda aval: (), apply=apply, name=f"largest_rows({k})")


def signs():
    def apply(u, state):
        return Signs(jnp.sign(u).astype(jnp.int8), jnp.abs(u).mean()), state

    return msbp.Sparsifier(init=lambda aval: (), apply=apply, name="signs")


def split(dx, dw):
    def apply(u, state):
        return msbp.Split(dx.apply(u, ())[0], dw.apply(u, ())[0]), state

    return msbp.Sparsifier(init=lambda aval: (), apply=apply, name=f"split({dx}, {dw})")


def reference(sparsifier):
    """The same choice as `Dense`, which has no products of its own."""

    def apply(u, state):
        p, state = sparsifier.apply(u, state)
        dx, dw = (msbp.Dense(part.materialize()) for part in p.parts)
        return msbp.Split(dx, dw), state

    return msbp.Sparsifier(init=sparsifier.init, apply=apply, name="reference")


PLAIN = {
    "rows": largest_rows(3),
    "signs": signs(),
    "split rows, columns": split(largest_rows(5), msbp.top_k(k=6, rows_per_group=None)),
    "split dense, rows": split(msbp.Sparsifier(lambda a: (), lambda u, s: (msbp.Dense(u), s)), largest_rows(2)),
    "split columns, signs": split(msbp.top_k(k=6), signs()),
}
WRAPPED = {"plain": lambda s: s} | {
    reduce: lambda s, reduce=reduce: msbp.memorized(
        s, 0.8, reduce=reduce, **({"shards": 2} if reduce == "local" else {})
    )
    for reduce in ("mean", "slot", "local")
}
PROGRAMS = {
    "product": lambda p, x: jnp.tanh(x @ p),
    "transposed": lambda p, x: jnp.tanh(jnp.einsum("nm,bm->nb", p.T, x)).T,
    "scan": lambda p, x: lax.map(lambda x: jnp.tanh(x @ p), jnp.stack([x, 2 * x])),
    "vmap": lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p))(jnp.stack([x, 2 * x])),
    "batched weights": lambda p, x: jnp.tanh(jnp.einsum("ebm,emn->ebn", jnp.stack([x, 2 * x]), jnp.stack([p, p]))),
    "convolution": lambda p, x: lax.conv_general_dilated(
        x.reshape(3, 4, 8),
        p.reshape(2, 4, 64),
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=2,
    ),
    "remat": jax.checkpoint(lambda p, x: jnp.tanh(x @ p)),
}


OTHERS = [name for name in PROGRAMS if name != "product"]


def steps(program, sparsifier, count=2):
    f = msbp.sparse_vjp(program, sparsifier)
    memory = f.init_memory(W, X)
    step = jax.jit(msbp.value_and_grad(lambda w, m, x: (f(w, x, memory=m) ** 2).mean(), has_aux=False))
    results = []
    for number in range(count):
        loss, grads, memory = step(W, memory, X * (1 + number))
        results.append((loss, grads, memory))
    return results


@pytest.mark.parametrize("name", PLAIN)
def test_the_contract(name):
    check_sparsifier(PLAIN[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrap", "program"),
    [
        *itertools.product(PLAIN, WRAPPED, ["product"]),
        *(
            (name, ("plain", "mean")[(i + j) % 2], program)
            for i, name in enumerate(PLAIN)
            for j, program in enumerate(OTHERS)
        ),
    ],
)
def test_against_the_matrix(name, wrap, program):
    """Gradients and memories over several steps are those of the same choice written out."""
    got, want = (steps(PROGRAMS[program], WRAPPED[wrap](s)) for s in (PLAIN[name], reference(PLAIN[name])))
    assert_trees_close(got, want, rtol=1e-4)


def test_its_own_products_run():
    calls.clear()
    steps(PROGRAMS["product"], largest_rows(3), 1)
    assert sorted(calls) == ["dw", "dx"]


def test_a_twin_in_plain_jax():
    """Rows that are not chosen are stopped; the choice is read off the gradient."""
    f = msbp.sparse_vjp(PROGRAMS["product"], largest_rows(3))
    loss = lambda y: (y**2).mean()
    _, got, _ = msbp.value_and_grad(lambda w, m: loss(f(w, X, memory=m)))(W, f.init_memory(W, X))
    y = X @ W
    chosen = np.isin(np.arange(12), kept_rows(jax.grad(lambda y: loss(jnp.tanh(y)))(y), 3))[:, None]
    keep = lambda y: jnp.where(chosen, y, lax.stop_gradient(y))
    want = jax.grad(lambda w: loss(jnp.tanh(keep(X @ w))))(W)
    assert_trees_close(got, want)


def test_report_and_diagnosis():
    f = msbp.sparse_vjp(
        lambda p, x: x @ p["a"] + x @ p["b"] + x @ p["c"],
        {"a": largest_rows(3), "b": msbp.memorized(signs(), 0.5), "c": PLAIN["split dense, rows"]},
    )
    params = dict.fromkeys("abc", W)
    report = f.report(params, X)
    rows = {row.name: row for row in report.sparse}
    assert (rows["a"].keeps, rows["a"].saved, rows["a"].backend) == ("3 of 12 rows", 0.75, "its own")
    assert (rows["b"].keeps, rows["b"].saved, rows["b"].backend) == ("?", 0, "xla, dense")
    assert rows["c"].keeps == "dx all, dw 2 of 12 rows"
    assert rows["c"].backend == "dx xla, dense; dw its own"
    np.testing.assert_allclose(rows["c"].saved, (1 - 2 / 12) / 2)
    assert "3 of 12 rows" in str(report)
    assert rows["b"].warning.endswith("(by the selection): Signs has no products of its own.")
    assert rows["a"].warning == rows["c"].warning == ""  # a part that is dense was asked to be
    loss = lambda p, m, x: (f(p, x, memory=m) ** 2).mean()
    sites = msbp.diagnose(loss)(params, f.init_memory(params, X), X).sites
    np.testing.assert_allclose(sites["a"].density, 0.25)
    np.testing.assert_allclose(sites["b"].density, 1)
    np.testing.assert_allclose(sites["c"].density, (1 + 2 / 12) / 2, rtol=1e-6)


def test_a_format_is_a_format():
    p, _ = largest_rows(3).apply(X @ W, ())
    assert isinstance(p, msbp.Format)
    np.testing.assert_array_equal(written_out(p), p.materialize())
    assert p.parts == (p, p)
    assert p.has_products
    assert not p.columns_are_shared
    assert not signs().apply(X, ())[0].has_products
    for wrong in (p.shared_columns, lambda dtype: msbp.Format.grad_weight(p, X, 1)):
        with pytest.raises(NotImplementedError, match=r"FewRows (does not say that rows share|has no products)"):
            wrong(jnp.float32)
    with pytest.raises(AssertionError, match=r"apply must return a Format such as Columns, got ArrayImpl"):
        check_sparsifier(msbp.Sparsifier(lambda aval: (), lambda u, s: (u, s)))
    assert_trees_equal(p.astype(jnp.bfloat16).materialize(), p.materialize().astype(jnp.bfloat16))
