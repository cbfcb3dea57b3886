"""Whatever maps, loops and slices stand between a memory and its use, its new value comes back to where it came from.

Sizes are equal throughout, so that nothing could be told by them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import assert_trees_close

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

B = 3  # every axis that is mapped has this size, and so has every axis of data
N, M = 64, 3
S = msbp.memorized(msbp.top_k(k=6, rows_per_group=1), decay=0.8)
F = msbp.sparse_vjp(lambda w, x: jnp.tanh(x @ w), S)
X = random_gradient(0, B * B * B * B, M).reshape(B, B, B, B, M) / 4
W = random_gradient(1, M, N) / 4
ONE = F.init_memory(W, X[0, 0, 0])


def memories(*axes):
    """Return different memories, stacked along new axes of a residual `[n]`: as in_axes counts them, one by one."""
    shape = [N]
    for axis in reversed(axes):
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, B)
    return jax.tree.map(lambda leaf: random_gradient(3, 1, int(np.prod(shape))).reshape(shape) / 9, ONE)


STEP = jax.jit(msbp.value_and_grad(lambda w, m, x: F(w, x, memory=m).sum()))


def alone(memory, x):
    """Return the new memory of one use, by itself: its residual is what is left, over the rows."""
    return STEP(W, memory, x)[2]


def mapped(levels, memory_axes, call):
    """Return `call(m, x)` under nested vmaps; of each level its in_axes for the memory, x is mapped at axis 0."""
    for axis in reversed(memory_axes):
        call = jax.vmap(call, in_axes=(axis, 0))
    assert len(memory_axes) == levels
    return call


def taken(memory, axes, index):
    """Return the memory of one member."""
    for axis, i in zip(axes, index, strict=True):
        if axis is not None:
            memory = jax.tree.map(lambda leaf, axis=axis, i=i: np.take(np.asarray(leaf), i, axis=axis), memory)
    return memory


CASES = [
    *itertools.product((0, 1, -1, None), repeat=1),
    *itertools.product((0, 1, -1, None), repeat=2),
    (None, 0, None),
    (0, None, 0),
    (0, None, 1),
    (1, None, 0),
    (0, 0, None),
    (None, -1, 1),
]


# Of one vmap alone the plain case says all there is.
NESTED = [axes for axes in CASES if len(axes) > 1]
HOW = [*itertools.product(["plain"], CASES), *itertools.product(["jit inside", "jit outside"], NESTED)]


@pytest.mark.slow
@pytest.mark.parametrize(("jit", "axes"), HOW, ids=str)
def test_nested_vmaps(jit, axes):
    call = lambda m, x: F(W_ARGUMENT.value, x, memory=m)
    call = jax.jit(call) if jit == "jit inside" else call
    memory = memories(*(axis for axis in axes if axis is not None))
    x = np.asarray(X)[(0,) * (3 - len(axes))]

    def loss(w, m):
        W_ARGUMENT.value = w
        return mapped(len(axes), axes, call)(m, x).sum()

    run = msbp.value_and_grad(loss)
    after = np.asarray((jax.jit(run) if jit == "jit outside" else run)(W, memory)[2]["params"].residual)
    # By hand: every member's own use, and the mean over those that share a memory (all have as many rows).
    groups = {}
    for index in itertools.product(range(B), repeat=len(axes)):
        own = tuple(i for i, axis in zip(index, axes, strict=True) if axis is not None)
        groups.setdefault(own, []).append(np.asarray(alone(taken(memory, axes, index), x[index])["params"].residual))
    for own, residuals in groups.items():
        marked = iter(own)
        index = [next(marked) if axis is not None else 0 for axis in axes]
        got = taken({"r": after}, axes, index)["r"]
        assert_trees_close(got, sum(residuals) / len(residuals))


class W_ARGUMENT:  # noqa: N801
    """The weights of the loss that now runs, for functions that are jit-compiled inside it."""

    value = W


def test_a_scan_over_layers_in_a_scan_over_time():
    """Stacked memories as inputs of one scan, one memory for all steps of another, of the same length."""
    ws = jnp.stack([W.T @ random_gradient(7 + i, M, N) / 99 for i in range(B)])  # [B, n, n]
    f = msbp.sparse_vjp(lambda w, h: jnp.tanh(h @ w), S)
    xs = random_gradient(11, B * 2, N).reshape(B, 2, N) / 9
    one = f.init_memory(ws[0], xs[0])
    stacked = jax.tree.map(lambda leaf: random_gradient(13, B, N) / 9, one)

    def layers(ws, ms, x):
        return jax.lax.scan(lambda h, s: (f(s[0], h, memory=s[1]), None), x, (ws, ms))[0]

    def loss(ws, ms):
        return jax.lax.scan(lambda total, x: (total + layers(ws, ms, x).sum(), None), 0.0, xs)[0]

    after = jax.jit(msbp.value_and_grad(loss))(ws, stacked)[2]["params"].residual
    unrolled = lambda ws, ms: sum(
        functools.reduce(
            lambda h, i, ws=ws, ms=ms: f(ws[i], h, memory=jax.tree.map(lambda leaf, i=i: leaf[i], ms)), range(B), x
        ).sum()
        for x in xs
    )
    assert_trees_close(msbp.value_and_grad(unrolled)(ws, stacked)[2]["params"].residual, after)
    each = [msbp.value_and_grad(lambda ws, ms, x=x: layers(ws, ms, x).sum())(ws, stacked)[2] for x in xs]
    assert_trees_close(sum(e["params"].residual for e in each) / B, after)


def test_slices_stacks_and_conds_of_a_memory():
    """A stacked memory taken apart by indices; two memories stacked and mapped; one chosen by a cond."""
    stacked = memories(0)
    x = X[0, 0]
    sliced = lambda w, m: sum(F(w, x[i], memory=jax.tree.map(lambda leaf, i=i: leaf[i], m)).sum() for i in range(2))
    after = msbp.value_and_grad(sliced)(W, stacked)[2]["params"].residual
    for i in range(2):
        assert_trees_close(after[i], alone(taken(stacked, (0,), (i,)), x[i])["params"].residual)
    np.testing.assert_array_equal(after[2], stacked["params"].residual[2])  # not used: as it was

    pair = {"a": taken(stacked, (0,), (0,)), "b": taken(stacked, (0,), (1,))}

    def both(w, m):
        together = jax.tree.map(lambda a, b: jnp.stack([a, b]), m["a"], m["b"])
        return jax.vmap(lambda m, x: F(w, x, memory=m))(together, x[:2]).sum()

    after = msbp.value_and_grad(both)(W, pair)[2]
    for i, name in enumerate("ab"):
        assert_trees_close(after[name], alone(pair[name], x[i]))

    def one_of_two(w, m, first):
        chosen = jax.lax.cond(first, lambda: m["a"], lambda: m["b"])
        return F(w, x[0], memory=chosen).sum()

    after = jax.jit(msbp.value_and_grad(one_of_two))(W, pair, False)[2]
    np.testing.assert_array_equal(after["a"]["params"].residual, pair["a"]["params"].residual)
    assert_trees_close(after["b"], alone(pair["b"], x[0]))


@pytest.mark.parametrize("axes", [(0,), (0, None), (None, 0), (0, 0)], ids=str)
def test_keys_of_mapped_memories_stay_with_their_members(axes):
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.random_k(k=6))
    start = f.init_memory(W, X[0, 0, 0])
    count = sum(axis is not None for axis in axes)
    keys = jax.random.split(start["params"].key, (B,) * count) if count else start["params"].key
    memory = {"params": start["params"]._replace(key=keys)}
    x = X[(0,) * (3 - len(axes))]
    loss = lambda w, m: mapped(len(axes), axes, lambda m, x: f(w, x, memory=m))(m, x).sum()
    after = jax.jit(msbp.value_and_grad(loss))(W, memory)[2]["params"].key
    assert after.shape == keys.shape
    bits = np.asarray(jax.random.key_data(jnp.stack([keys, after]))).reshape(-1, 2)
    assert len(np.unique(bits, axis=0)) == len(bits)


def test_a_counter_and_a_flag_in_a_state():
    """Integers are added up over all uses; a flag is True if any use says so; both stay where nothing ran."""

    def apply(u, state):
        columns = msbp.take_columns(u, jnp.arange(4, dtype=jnp.int32)[None], rows_per_group=None)
        large = state["bits"] + jnp.uint32(0x80000001)
        return columns, {
            "calls": state["calls"] + 1,
            "seen": jnp.any(u > 0),
            "bits": large,
            "small": state["small"] - 1,
        }

    def init(aval):
        return {
            "calls": jnp.zeros((), jnp.int32), "seen": jnp.zeros((), bool), "bits": jnp.ones((2,), jnp.uint32),
            "small": jnp.zeros((), jnp.int8),
        }  # fmt: skip

    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.Sparsifier(init=init, apply=apply, name="counting"))
    memory = f.init_memory(W, X[0, 0, 0])
    once = jax.jit(msbp.value_and_grad(lambda w, m: f(w, X[0, 0, 0], memory=m).sum()))(W, memory)[2]["params"]
    assert (int(once["calls"]), bool(once["seen"]), int(once["small"])) == (1, True, -1)
    assert once["bits"].tolist() == [0x80000002] * 2
    assert {name: leaf.dtype for name, leaf in once.items()} == {n: leaf.dtype for n, leaf in init(None).items()}
    many = lambda w, m: jax.vmap(lambda x: f(w, x, memory=m))(X[0, 0]).sum() - f(w, X[1, 0, 0], memory=m).sum()
    after = msbp.value_and_grad(many)(W, memory)[2]["params"]
    assert (int(after["calls"]), bool(after["seen"]), int(after["small"])) == (B + 1, True, -(B + 1))
    never = lambda w, m: jax.lax.cond(w.sum() > 1e9, lambda: f(w, X[0, 0, 0], memory=m).sum(), lambda: w.sum())
    after = jax.jit(msbp.value_and_grad(never))(W, memory)[2]["params"]
    assert (int(after["calls"]), bool(after["seen"]), int(after["small"])) == (0, False, 0)


def test_value_and_grad_inside_a_shard_map():
    """Each device's own rows, a memory that all share: gradients and memory are those of all rows."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x = random_gradient(5, 16, M)
    f = msbp.sparse_vjp(lambda w, x: jnp.tanh(x @ w), S)
    memory = jax.tree.map(lambda leaf: leaf + 0.1, f.init_memory(W, x))
    loss = lambda w, m, x: f(w, x, memory=m).sum()
    local = lambda w, m, x: msbp.value_and_grad(loss)(w, m, x)[1:]
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec(), spec("d")), out_specs=spec()))(W, memory, x)
    assert_trees_close(got, msbp.value_and_grad(loss)(W, memory, x)[1:])
    own = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 2, leaf * 3, leaf * 4]), memory)  # or one for each device

    def each(w, m, x):
        return msbp.value_and_grad(loss)(w, jax.tree.map(lambda leaf: leaf[0], m), x)[2]["params"].residual[None]

    got = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(spec(), spec("d"), spec("d")), out_specs=spec("d")))(
        W, own, x
    )
    for i in range(4):
        want = msbp.value_and_grad(loss)(W, taken(own, (0,), (i,)), x[4 * i : 4 * i + 4])[2]
        assert_trees_close(got[i], want["params"].residual)
