"""What devices say to each other for rows, read in compiled programs: scores of rows, and what a dense step says."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_devices import collectives
from twins import assert_trees_close

import msbp_jax as msbp
from msbp_jax import Rows, kernels
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.native import calls
from msbp_jax.testing import random_gradient

ROWS, M, N, OUT, LAYERS = 64, 24, 72, 10, 3
PARAMS = {"a": random_gradient(0, M, N) / 5, "b": random_gradient(1, N, N) / 8, "c": random_gradient(2, N, OUT) / 8}
X, TARGET = random_gradient(3, ROWS, M), random_gradient(4, ROWS, OUT)
WEIGHTS = [M * N, N * N, N * OUT]
PLACES = {
    "data": {"a": P(), "b": P(), "c": P()},
    "tensor": {"a": P(None, "model"), "b": P("model"), "c": P()},
    "fsdp": {"a": P("data"), "b": P("data"), "c": P("data")},
    "fsdp by outputs": {"a": P(None, "data"), "b": P("data"), "c": P("data")},
}
BACKENDS = [None, "xla", *(["native"] if calls.available() else [])]
SAMPLED, SKIPPED = msbp.sample_rows(density=0.25), msbp.skip_zero_rows()


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def mesh_of():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def placed(tree, specs):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh_of(), spec)), tree, specs)


def step_of(f):
    return jax.jit(msbp.value_and_grad(lambda p, m, x, t: ((f(p, x, memory=m) - t) ** 2).sum()))


def dense(p, m, x, t):
    loss, grads = jax.value_and_grad(lambda p: ((network(p, x) - t) ** 2).sum())(p)
    return loss, grads, m


def bits(tree):
    return jax.tree.map(
        lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a, tree
    )


@functools.cache
def of_one_device(plan, backend):
    """Return a step, its memory and what it gives on one device."""
    f = msbp.sparse_vjp(network, plan, backend=backend, min_features=1)
    step, memory = step_of(f), f.init_memory(PARAMS, X)
    return step, memory, bits(step(PARAMS, memory, X, TARGET))


@functools.cache
def of_dense(placement):
    there = placed(PARAMS, PLACES[placement]), {}, *placed((X, TARGET), (P("data"), P("data")))
    return collections.Counter(collectives(jax.jit(dense).lower(*there).compile()))


def compared(placement, plan, backend):
    """Return what the sparse step's collectives have beyond the dense step's; the numbers are those of one device."""
    step, memory, want = of_one_device(plan, backend)
    there = placed(PARAMS, PLACES[placement]), memory, *placed((X, TARGET), (P("data"), P("data")))
    compiled = step.lower(*there).compile()
    assert_trees_close(bits(compiled(*there)), want, rtol=1e-4)
    extra, plain = collections.Counter(collectives(compiled)), of_dense(placement)
    assert placement.startswith("fsdp") or not plain - extra
    return extra - plain, plain


def expected(placement, plan, backend):
    """Return the collectives that rows add.

    Each step, for a draw: the scores; the largest of them, and how many rows took part. Each site, where the choice of
    products is the run's: the share of the rows that is kept, and in the program, of which one branch runs, dw twice.
    Where devices have parts of a row, whether any of it is not 0.
    """
    found = collections.Counter()
    if plan is SAMPLED:
        found += collections.Counter({("all-gather", ROWS): 1, ("all-reduce", 1): 2})
    if backend is None:
        halves = {"data": WEIGHTS, "tensor": [M * N // 2, N * N // 2, N * OUT]}[placement]
        found += collections.Counter([("all-reduce", 1)] * LAYERS + [("all-reduce", size) for size in halves])
    if placement == "tensor":
        found[("all-reduce", ROWS // 4)] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "plan", "backend"),  # both plans on each backend, and both placements
    [
        case
        for i, backend in enumerate(BACKENDS)
        for case in (("data", (SAMPLED, SKIPPED)[i % 2], backend), ("tensor", (SKIPPED, SAMPLED)[i % 2], backend))
    ],
    ids=str,
)
def test_what_rows_add_to_the_collectives_of_a_dense_step(placement, plan, backend):
    extra, _ = compared(placement, plan, backend)
    assert extra == expected(placement, plan, backend)


def test_scores_are_all_that_is_gathered():
    extra, plain = compared("data", SAMPLED, "xla")
    assert extra == expected("data", SAMPLED, "xla")
    assert [size for kind, size in extra + plain if kind == "all-gather"] == [ROWS]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("placement", ["fsdp", "fsdp by outputs"])
def test_parameters_over_the_axis_of_the_batch(placement, backend):
    """The numbers are right; no more is gathered than in a dense step but scores, whether rows are 0, and weights."""
    extra, plain = compared(placement, SAMPLED, backend)
    gathered = {size for kind, size in extra if kind == "all-gather"}
    assert gathered <= {ROWS, *WEIGHTS, *(size for kind, size in plain if kind == "all-gather")}


@pytest.mark.parametrize("backend", ["xla", None])
@pytest.mark.parametrize("own", [False, True], ids=["one memory", "a memory of each device"])
def test_inside_a_shard_map_nothing_is_said_for_rows(backend, own):
    """One memory for all devices is the mean of what they tell: the numbers of its state, and no more."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    f = msbp.sparse_vjp(network, SAMPLED, backend=backend, min_features=1)
    memory = f.init_memory(PARAMS, X[:8])
    if own:
        memory = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), memory)

    def step(apply, p, m, x, t):
        local = lambda p, m, x, t: lax.psum(((apply(p, m, x) - t) ** 2).sum(), "data")
        specs = P(), P("data") if own else P(), P("data"), P("data")
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(p, m, x, t)

    def sparse(p, m, x):
        return f(p, x, memory=jax.tree.map(lambda leaf: leaf[0], m) if own else m)

    there = PARAMS, memory, *jax.device_put((X, TARGET), NamedSharding(mesh, P("data")))
    plain = jax.jit(jax.grad(lambda p, m, x, t: step(lambda p, m, x: network(p, x), p, m, x, t))).lower(*there)
    found = jax.jit(msbp.value_and_grad(functools.partial(step, sparse))).lower(*there)
    loss = [("all-reduce", 1)]
    extra = collections.Counter(collectives(found.compile())) - collections.Counter(collectives(plain.compile()) + loss)
    assert {(kind, size) for kind, size in extra} == (set() if own else {("all-reduce", 1)})
    assert extra.total() <= (0 if own else len(jax.tree.leaves(memory)) + 1)


def spread(tree, spec, shape=(8,), names=("data",)):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    return jax.device_put(tree, NamedSharding(mesh, spec))


def some_rows(seed, *shape):
    """Return values, and weights of which about a third are not 0, all of them on some devices."""
    weight = np.random.default_rng(seed).random(shape[:-1]) < np.linspace(0, 0.7, shape[-2])
    return random_gradient(seed, int(np.prod(shape[:-1])), shape[-1]).reshape(shape), jnp.asarray(
        weight * 2, jnp.float32
    )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_batch_axis_over_devices(backend):
    """Experts on devices of their own: no rows leave them."""
    values, weight = some_rows(0, 8, 16, 20)
    x = random_gradient(1, 8 * 16, 12).reshape(8, 16, 12)
    w = random_gradient(2, 12, 20)

    @jax.jit
    def products(values, weight, x, w):
        def one(values, weight, x):
            p = Rows(values, weight)
            return kernels.grad_weight(p, x, 1, backend=backend), kernels.grad_input(p, w, 1, backend=backend)

        return jax.vmap(one)(values, weight, x)

    there = (*spread((values, weight, x), P("data")), w)
    assert_trees_close(products(*there), products(values, weight, x, w), rtol=1e-5)
    assert not collectives(products.lower(*there).compile())


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [64, 63], ids=["even", "uneven"])
def test_devices_have_parts_of_rows_and_of_features(backend, axis, rows):
    values, weight = some_rows(0, rows, 20)
    x, w = random_gradient(1, rows, 12), random_gradient(2, 12, 20)
    w = w if axis == 1 else w.T
    call = jax.jit(
        lambda values, weight, x, w: (
            kernels.grad_weight(Rows(values, weight), x, axis, backend=backend),
            kernels.grad_input(Rows(values, weight), w, axis, backend=backend),
        )
    )
    want = call(values, weight, x, w)
    mesh = (2, 2, 2), ("i", "m", "n")
    i = "i" if rows % 2 == 0 else None
    specs = P(i, "n"), P(i), P(i, "m"), P("m", "n") if axis == 1 else P("n", "m")
    there = [spread(array, spec, *mesh) for array, spec in zip((values, weight, x, w), specs, strict=True)]
    assert_trees_close(call(*there), want, rtol=1e-5)
    if i:
        assert {kind for kind, _ in collectives(call.lower(*there).compile())} == {"all-reduce"}


def test_xla_s_products_over_devices_have_derivatives():
    values, weight = some_rows(0, 64, 20)
    x = random_gradient(1, 64, 12)
    loss = lambda values, x: (kernels.grad_weight(Rows(values, weight), x, 1, backend="xla") ** 2).sum()
    want = jax.grad(lambda values, x: ((x.T @ (values * weight[:, None])) ** 2).sum(), argnums=(0, 1))(values, x)
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(*spread((values, x), P("data")))
    assert_trees_close(got, want, rtol=1e-4)


def test_a_step_of_many_devices_is_exported():
    f = msbp.sparse_vjp(network, SAMPLED, backend="xla", min_features=1)
    there = PARAMS, f.init_memory(PARAMS, X), *spread((X, TARGET), P("data"))
    step = step_of(f)
    file = export.export(step)(*there).serialize()
    assert_trees_close(bits(export.deserialize(file).call(*there)), bits(step(*there)), rtol=1e-4)


def test_several_tpus_have_plain_products(monkeypatch):
    """There JAX cannot split what is not its own."""
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    values, weight = some_rows(0, 64, 20)
    x = random_gradient(1, 64, 12)

    def program():  # of a function that is new, as JAX remembers what it has traced
        return str(
            jax.make_jaxpr(lambda values, x: kernels.grad_weight(Rows(values, weight), x, 1, backend="xla"))(values, x)
        )

    assert "custom_partitioning" not in program()
    monkeypatch.undo()
    assert "custom_partitioning" in program()
