"""Whole training steps in files of `jax.export`: written with XLA's kernels, for a batch of any size too."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import msbp_jax as msbp

pytestmark = pytest.mark.slow

W = jax.random.normal(jax.random.key(0), (8, 64))
X = jax.random.normal(jax.random.key(1), (8, 8))


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def any_rows():
    return jax.ShapeDtypeStruct((export.symbolic_shape("b")[0], 8), jnp.float32)


def step_of(sparsifier, backend):
    f = msbp.sparse_vjp(lambda w, x: jnp.tanh(x @ w), sparsifier, backend=backend)
    step = jax.jit(msbp.value_and_grad(lambda w, m, x: (f(w, x, memory=m) ** 2).mean()))
    return step, f.init_memory(W, X)


def through_a_file(step, *arguments):
    return export.deserialize(export.export(step)(*arguments).serialize())


def assert_close(got, want):
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    numbers = lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-6), got, want)


TOP = functools.partial(msbp.top_k, k=6)
SPARSIFIERS = {
    "r=1": TOP(),
    "r=3": TOP(rows_per_group=3),
    "whole": TOP(rows_per_group=None),
    "example": TOP(rows_per_group="example"),
    "mean": msbp.memorized(TOP(rows_per_group=2), 0.8),
    "random": msbp.random_k(k=6, rescale=True),
    "memorized random": msbp.memorized(msbp.random_k(k=6), 0.8),
    "rows": msbp.sample_rows(efficiency=0.8),
    "groups of rows": msbp.sample_rows(efficiency=0.8, rows_per_group=3),
    "a share of the rows": msbp.sample_rows(density=0.5),
    "a number of rows": msbp.sample_rows(count=1),
    "rows at the site": {"*": msbp.sample_rows(efficiency=0.8)},
    "dithered": msbp.dithered(2),
    "dithered, 8 bits": msbp.dithered(2, bits=8),
    "dithered where it enters": {"@outputs": msbp.dithered(2), "*": msbp.skip_zero_rows()},
    "entries": msbp.sample_entries(0.3),
    "pruned": msbp.stochastic_prune(0.8),
    "rows of zeros": msbp.skip_zero_rows(),
    "split": msbp.split(dx=msbp.dense(), dw=TOP()),
}


# A step and its first memory, compiled for the one case and used in the other.
warmed = functools.cache(lambda name: _warmed(*step_of(SPARSIFIERS[name], "xla")))


def _warmed(step, memory):
    return step, memory, step(W, memory, X)[2]


# Every sparsifier for a batch of any size, every second one for a given size.
@pytest.mark.parametrize(
    ("name", "symbolic"),
    [(name, symbolic) for i, name in enumerate(SPARSIFIERS) for symbolic in ((True, False) if i % 2 == 0 else (True,))],
)
def test_a_step(name, symbolic):
    step, memory, warm = warmed(name)
    exported = through_a_file(step, abstract(W), abstract(memory), any_rows() if symbolic else abstract(X))
    # Of any size: sizes that groups do not divide and one row, by turns, as each is compiled anew.
    rows = (7, 1)[list(SPARSIFIERS).index(name) % 2] if symbolic else 8
    assert_close(exported.call(W, warm, X[:rows]), step(W, warm, X[:rows]))


@pytest.mark.parametrize("reduce", ["slot", "local"])
def test_memories_of_a_given_batch(reduce):
    options = {"shards": 2} if reduce == "local" else {}
    step, memory = step_of(msbp.memorized(TOP(), 0.8, reduce=reduce, **options), "xla")
    exported = through_a_file(step, *map(abstract, (W, memory, X)))
    assert_close(exported.call(W, memory, X), step(W, memory, X))


@pytest.mark.skipif("native" not in msbp.backends()["grad_input"], reason="the native kernels were not built")
@pytest.mark.parametrize("sparsifier", [msbp.top_k(k=6), msbp.memorized(msbp.top_k(k=6), 0.8)])
def test_native_kernels_say_what_to_do(sparsifier):
    step, memory = step_of(sparsifier, "native")
    with pytest.raises(NotImplementedError, match=r'jax\.export cannot .*pass backend="xla" to sparse_vjp'):
        export.export(step)(*map(abstract, (W, memory, X)))
    step(W, memory, X)  # the refusal is of the export alone


def test_a_model_whose_kernel_is_chosen_can_be_evaluated_from_a_file():
    """Evaluation has no kernels of ours in it, whatever the backend."""
    model = msbp.sparse_vjp(nn.Dense(64), SPARSIFIERS["mean"])
    variables = model.init(jax.random.key(0), X)
    exported = through_a_file(jax.jit(model.apply), abstract(variables), any_rows())
    assert_close(exported.call(variables, X[:5]), model.apply(variables, X[:5]))


def test_for_several_platforms_and_with_loops():
    f = msbp.sparse_vjp(
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["in"], p["s"])[0],
        SPARSIFIERS["mean"],
        backend="xla",
    )
    params = {"in": W, "s": jax.random.normal(jax.random.key(2), (3, 64, 64)) / 8}
    memory = f.init_memory(params, X)
    step = jax.jit(msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean(), microbatches=2))
    exported = export.export(step, platforms=("cpu", "cuda", "tpu"))(*map(abstract, (params, memory, X)))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert not exported.disabled_safety_checks
    assert_close(export.deserialize(exported.serialize()).call(params, memory, X), step(params, memory, X))


def test_the_backend_is_said_in_one_place():
    """`sparse_vjp(backend="xla")` reaches the selection too."""
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=6), 0.8), backend="xla")
    step = jax.jit(msbp.value_and_grad(lambda w, m, x: (f(w, x, memory=m) ** 2).mean()))
    memory = f.init_memory(W, X)
    exported = through_a_file(step, *map(abstract, (W, memory, X)))
    assert_close(exported.call(W, memory, X), step(W, memory, X))
