"""Many devices: the same numbers as one, the collectives of a dense backward, and a mean of the memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from twins import assert_trees_close

import msbp_jax as msbp

N, ROWS = 64, 64
WHOLE, BY_ROWS = PartitionSpec(), PartitionSpec("data")
PLACES = {
    "data": {"a": WHOLE, "b": WHOLE},
    "tensor": {"a": PartitionSpec(None, "model"), "b": PartitionSpec("model")},
    "fsdp": {"a": PartitionSpec(None, "data"), "b": BY_ROWS},
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])


@functools.cache
def data():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (16, N)) / 4, "b": jax.random.normal(keys[1], (N, N)) / 8}
    return params, jax.random.normal(keys[2], (ROWS, 16))


def step_of(f):
    return jax.jit(msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean()))


def placed(tree, mesh, specs):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs)


def collectives(compiled):
    """Return the collectives of a compiled program as (kind, sizes of what they move, smallest first)."""
    pattern = r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    found = []
    for shape, kind in re.findall(pattern, compiled.as_text()):
        sizes = [int(np.prod([int(d) for d in dims.split(",") if d])) for dims in re.findall(r"\w+\[([\d,]*)\]", shape)]
        found += [(kind, size) for size in sizes]
    return sorted(found)


@functools.cache
def of_dense(placement, kind):
    """Return the collectives of a dense step."""
    params, x = data()
    there, x = (
        placed(params, mesh_of(kind), PLACES[placement]),
        jax.device_put(x, NamedSharding(mesh_of(kind), BY_ROWS)),
    )
    step = jax.jit(jax.value_and_grad(lambda p, x: (network(p, x) ** 2).mean()))
    return collectives(step.lower(there, x).compile())


TOP = msbp.top_k(k=7, rows_per_group=4)
WHOLE_BATCH = msbp.top_k(k=7, rows_per_group=None)


def pairs(*cases):
    """Return every case over the batch's axis, and half of them, by turns, for each other placement."""
    others = [("tensor", AxisType.Auto), ("fsdp", AxisType.Auto), ("data", AxisType.Explicit)]
    whole = [("data", AxisType.Auto, *case) for case in cases]
    return whole + [(*other, *case) for i, other in enumerate(others) for case in cases[i % 2 :: 2]]


# With explicit axes, JAX asks for an out_sharding of products of sharded weights in the program itself.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "kind", "sparsifier", "extra"),
    pairs(
        # What the sparse backward adds: a mean of the memory for each of two sites, a sum and a number of rows; where
        # the whole batch makes one choice, a sum of its scores as well; nothing where each shard keeps its own memory.
        (TOP, []),
        (msbp.memorized(TOP, 0.8), [("all-reduce", N), ("all-reduce", 1)] * 2),
        (msbp.memorized(msbp.top_k(k=7), 0.8), [("all-reduce", N), ("all-reduce", 1)] * 2),
        (msbp.memorized(WHOLE_BATCH, 0.8), [("all-reduce", N), ("all-reduce", 1), ("all-reduce", N)] * 2),
        (msbp.memorized(WHOLE_BATCH, 0.8, reduce="local", shards=4), []),
        (msbp.memorized(TOP, 0.8, reduce="local", shards=4), []),
    ),
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_sharded_under_jit(placement, sparsifier, extra, kind):
    params, x = data()
    f = msbp.sparse_vjp(network, sparsifier)
    memory = f.init_memory(params, x)
    step = step_of(f)
    want = step(params, memory, x)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        local = BY_ROWS if "local" in str(sparsifier) else WHOLE
        there = placed(params, mesh, PLACES[placement])
        memory = placed(memory, mesh, jax.tree.map(lambda _: local, memory))
        x = jax.device_put(x, NamedSharding(mesh, BY_ROWS))
        compiled = step.lower(there, memory, x).compile()
        assert_trees_close(compiled(there, memory, x), want)
        found, dense = collectives(compiled), of_dense(placement, kind)
    if placement != "tensor":
        assert found == sorted(dense + extra)
    else:  # a choice among features that devices share needs their gradients: inside shard_map it does not
        assert any(kind == "all-gather" for kind, _ in found)


def mapped(mesh, specs, out, check=True):
    return jax.shard_map(network, mesh=mesh, in_specs=(specs, BY_ROWS), out_specs=out, check_vma=check)


@pytest.mark.parametrize("sparsifier", [TOP, msbp.memorized(TOP, 0.8), msbp.memorized(TOP, 0.8, reduce="slot")])
def test_shard_map_over_the_batch_is_one_device(sparsifier):
    """Groups lie within shards, so that the choices are those of the whole batch."""
    params, x = data()
    f = msbp.sparse_vjp(mapped(mesh_of(), WHOLE, BY_ROWS), sparsifier)
    if "slot" in str(sparsifier):  # rows differ between devices, and a memory by row cannot be shared
        assert f.init_memory(params, x)["a"].residual.shape == (ROWS // 4, N)
        return
    memory = f.init_memory(params, x)
    alone = msbp.sparse_vjp(network, sparsifier)
    got, want = step_of(f)(params, memory, x), step_of(alone)(params, alone.init_memory(params, x), x)
    assert_trees_close(got, want)
    assert_trees_close(step_of(f)(params, got[2], x), step_of(alone)(params, want[2], x))


def test_shard_map_adds_a_mean_of_the_memory_or_nothing():
    params, x = data()
    mesh = mesh_of()
    specs = {"a": WHOLE, "b": PartitionSpec(None, "model")}
    out = PartitionSpec("data", "model")
    there = placed(params, mesh, specs)
    sharded_x = jax.device_put(x, NamedSharding(mesh, BY_ROWS))
    plain = mapped(mesh, specs, out)
    dense = collectives(
        jax.jit(jax.value_and_grad(lambda p, x: (plain(p, x) ** 2).mean())).lower(there, sharded_x).compile()
    )
    shapes = {"mean": {"a": (N,), "b": (2, N // 2)}, "local": {"a": (4, N), "b": (4, 2, N // 2)}}
    for reduce, wanted in shapes.items():
        f = msbp.sparse_vjp(plain, msbp.memorized(WHOLE_BATCH, 0.8, reduce=reduce), min_features=1)
        memory = f.init_memory(params, x)
        assert {site: state.residual.shape for site, state in memory.items()} == wanted
        own = {"a": {"mean": WHOLE, "local": BY_ROWS}, "b": {"mean": PartitionSpec("model"), "local": out}}
        memory = {
            site: placed(s, mesh, jax.tree.map(lambda _, s=own[site][reduce]: s, s)) for site, s in memory.items()
        }
        compiled = step_of(f).lower(there, memory, sharded_x).compile()
        assert compiled.output_shardings[2]["b"].residual.is_equivalent_to(memory["b"].residual.sharding, 3)
        extra = collectives(compiled)
        for collective in dense:
            extra.remove(collective)
        numbers = [("all-reduce", 1)] * 2  # of rows; inside a shard_map XLA may have them whole, [n]
        assert extra == ([*numbers, ("all-reduce", N // 2), ("all-reduce", N)] if reduce == "mean" else [])


def test_shards_of_a_weight_choose_and_remember_each_for_itself():
    """Tensor parallel: each half of the features is a layer of its own."""
    params, x = data()
    specs = {"a": WHOLE, "b": PartitionSpec(None, "model")}
    s = msbp.memorized(TOP, 0.8)
    f = msbp.sparse_vjp(mapped(mesh_of(), specs, PartitionSpec("data", "model")), s, min_features=1)

    def halves(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.tanh(jnp.concatenate([h @ p["b"]["left"], h @ p["b"]["right"]], axis=1))

    both = {"a": params["a"], "b": {"left": params["b"][:, : N // 2], "right": params["b"][:, N // 2 :]}}
    twin = msbp.sparse_vjp(halves, s, min_features=1)
    memory, twin_memory = f.init_memory(params, x), twin.init_memory(both, x)
    for _ in range(2):
        loss, grads, memory = step_of(f)(params, memory, x)
        twin_loss, twin_grads, twin_memory = step_of(twin)(both, twin_memory, x)
        assert_trees_close(loss, twin_loss)
        assert_trees_close(grads["b"], jnp.concatenate(list(twin_grads["b"].values()), axis=1))
        assert_trees_close(memory["a"].residual, twin_memory["a"].residual)
        each = jnp.stack([twin_memory[f"b/{side}"].residual for side in ("left", "right")])
        assert_trees_close(memory["b"].residual, each)


def test_gathered_shards_are_one_weight():
    """FSDP inside shard_map: what is gathered is the same on all devices, and has one memory."""
    params, x = data()

    def gathered(p, x):
        return network({name: lax.all_gather(w, "data", axis=0, tiled=True) for name, w in p.items()}, x)

    for check in (True, False):
        f = msbp.sparse_vjp(
            jax.shard_map(gathered, mesh=mesh_of(), in_specs=(BY_ROWS, BY_ROWS), out_specs=BY_ROWS, check_vma=check),
            msbp.memorized(TOP, 0.8),
        )
        memory = f.init_memory(params, x)
        assert memory["b"].residual.shape == (N,)
        alone = msbp.sparse_vjp(network, msbp.memorized(TOP, 0.8))
        got, want = step_of(f)(params, memory, x), step_of(alone)(params, memory, x)
        assert_trees_close(got[:2], want[:2])
        if check:
            assert_trees_close(got[2], want[2])


def in_a_scan(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["stack"])[0]


def with_random_features(p, x):
    return jnp.tanh(x @ p["a"])


@pytest.mark.slow
@pytest.mark.parametrize("check", [True, False])
def test_loops_branches_and_vmap_around_and_inside(check):
    params, x = data()
    params = {"a": params["a"], "stack": jnp.stack([params["b"], -params["b"], params["b"].T])}
    inside = jax.shard_map(in_a_scan, mesh=mesh_of(), in_specs=(WHOLE, BY_ROWS), out_specs=BY_ROWS, check_vma=check)

    def around(p, x):
        one = jax.shard_map(
            lambda h, w: jnp.tanh(h @ w), mesh=mesh_of(), in_specs=(BY_ROWS, WHOLE), out_specs=BY_ROWS, check_vma=check
        )
        return lax.scan(lambda h, w: (one(h, w), None), x @ p["a"], p["stack"])[0]

    alone = msbp.sparse_vjp(in_a_scan, msbp.memorized(TOP, 0.8))
    memory = alone.init_memory(params, x)
    want = step_of(alone)(params, memory, x)
    for function in (inside, around):
        f = msbp.sparse_vjp(function, msbp.memorized(TOP, 0.8))
        assert jax.tree.map(jnp.shape, f.init_memory(params, x)) == jax.tree.map(jnp.shape, memory)
        got = step_of(f)(params, memory, x)
        assert_trees_close(got[:2], want[:2])
        if check:  # without it JAX divides gradients inside by the devices that compute the same
            assert_trees_close(got[2], want[2])
    xs = jnp.stack([x, 2 * x])
    f = msbp.sparse_vjp(lambda p, xs: jax.vmap(inside, (None, 0))(p, xs), msbp.memorized(TOP, 0.8))
    twin = msbp.sparse_vjp(lambda p, xs: jax.vmap(in_a_scan, (None, 0))(p, xs), msbp.memorized(TOP, 0.8))
    got, want = (step_of(g)(params, g.init_memory(params, xs), xs) for g in (f, twin))
    assert_trees_close(got[:2], want[:2])
    if check:
        assert_trees_close(got[2], want[2])


@pytest.mark.leaks
def test_devices_that_share_a_key_draw_differently():
    params, x = data()
    f = msbp.sparse_vjp(
        jax.shard_map(with_random_features, mesh=mesh_of(), in_specs=({"a": WHOLE}, BY_ROWS), out_specs=BY_ROWS),
        msbp.random_k(k=7, rows_per_group=None, key=jax.random.key(3)),
    )
    memory = f.init_memory({"a": params["a"]}, x)
    _, grads, after = step_of(f)({"a": params["a"]}, memory, x)
    assert 7 < int(jnp.count_nonzero(grads["a"].any(axis=0))) <= 28
    assert after["a"].key.shape == ()
    assert jax.random.key_data(after["a"].key).tolist() != jax.random.key_data(memory["a"].key).tolist()


def test_what_is_the_same_on_all_devices_is_logged_once():
    params, x = data()
    s = msbp.memorized(msbp.random_k(k=7, rows_per_group=4), 0.8)
    f = msbp.sparse_vjp(jax.shard_map(network, mesh=mesh_of(), in_specs=(WHOLE, WHOLE), out_specs=WHOLE), s)
    alone = msbp.sparse_vjp(network, s)
    memory = f.init_memory(params, x)
    assert_trees_close(step_of(f)(params, memory, x)[:2], step_of(alone)(params, memory, x)[:2])


def test_a_shard_map_within_another_is_left_alone():
    params, x = data()

    def outer(p, x):
        inner = jax.shard_map(
            lambda w, x: jnp.tanh(x @ w), in_specs=(WHOLE, BY_ROWS), out_specs=BY_ROWS, axis_names={"data"}
        )
        return inner(p["a"], x)

    with jax.set_mesh(mesh_of()):
        nested = jax.shard_map(outer, in_specs=(WHOLE, WHOLE), out_specs=WHOLE, axis_names={"model"})
        f = msbp.sparse_vjp(lambda p, x: jax.jit(nested)(p, x) @ p["b"], TOP)
        report = f.report(params, x)
    assert [(row.name, row.reason) for row in report.dense] == [("a", "inside a shard_map within a shard_map")]


def test_local_memory_needs_whole_groups_in_every_shard():
    g = jnp.ones((24, N))
    with pytest.raises(ValueError, match=r'reduce="local" cuts the rows into 5 equal blocks, which 24 rows do not'):
        msbp.memorized(TOP, 0.8, reduce="local", shards=5).init(g)
    local = msbp.memorized(msbp.top_k(k=3, rows_per_group=5), 0.8, reduce="local", shards=2)
    with pytest.raises(
        ValueError, match=r"needs blocks of whole groups: 5 rows share a choice, and a block has 12 rows"
    ):
        local.apply(g, local.init(g))
    with pytest.raises(ValueError, match=r'shards=2 is for reduce="local", got reduce=\'mean\''):
        msbp.memorized(TOP, 0.8, shards=2)


@pytest.mark.slow
@pytest.mark.parametrize("sparsifier", [msbp.top_k(k=6), msbp.memorized(msbp.top_k(k=6), decay=0.8)])
@pytest.mark.parametrize("layers", ["vmap", "experts", "plain"])
def test_arrays_that_are_not_placed_on_the_mesh(layers, sparsifier):
    """Under a mesh, arrays that nobody placed on it: XLA names no axes for them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(1), (8, 3, 4))
    w = jax.random.normal(jax.random.key(0), (8, 4, 64) if layers == "experts" else (4, 64))
    product = "ebm,emn->ebn" if layers == "experts" else "...m,mn->...n"
    f = msbp.sparse_vjp(lambda w, x: jnp.sin(jnp.einsum(product, x, w)), sparsifier)
    memory = f.init_memory(w, x[0] if layers == "vmap" else x)

    def loss(w, m, x):
        y = jax.vmap(lambda x: f(w, x, memory=m))(x) if layers == "vmap" else f(w, x, memory=m)
        return y.sum()

    want = jax.jit(msbp.value_and_grad(loss))(w, memory, x)
    with jax.set_mesh(mesh):
        got = jax.jit(msbp.value_and_grad(loss))(w, memory, x)
    assert_trees_close(got, want)
