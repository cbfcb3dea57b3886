"""A row whose cotangent is exactly 0 takes part in nothing: a padded batch is the batch without its padding."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

N, M, K = 24, 5, 4
CASES = {"xla": 6, "native": 6}
# The Pallas kernels are interpreted: slow, so they see one case each.
INTERPRETED = {
    ("gpu", "mean"): {"seed": 1, "rows": 5, "group": 2, "behind": 3, "between": 1, "fill": 100.0},
    ("gpu", "slot"): {"seed": 2, "rows": 6, "group": None, "behind": 2, "between": 2, "fill": -1e30},
    ("gpu", "local"): {"seed": 3, "rows": 4, "group": 1, "behind": 1, "between": 1, "fill": 0.0},
    ("tpu", "mean"): {"seed": 4, "rows": 7, "group": None, "behind": 2, "between": 1, "fill": -1e30},
    ("tpu", "slot"): {"seed": 5, "rows": 6, "group": 1, "behind": 4, "between": 2, "fill": 100.0},
    ("tpu", "local"): {"seed": 6, "rows": 5, "group": 3, "behind": 1, "between": 1, "fill": 100.0},
}
BACKENDS = [name for name in msbp.backends()["select_with_memory"] if name in ("xla", "native", "gpu", "tpu")]


def integers(seed, *shape):
    """Return small integers: sums of them are exact, in any order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def live_rows(seed, rows, n=N):
    """Return a gradient none of whose rows is 0."""
    g = integers(seed, rows, n)
    g[:, 0] = 5
    return g


def step(sparsifier, backend):
    f = msbp.sparse_vjp(lambda p, x: x @ p["w"], sparsifier, min_features=1, backend=backend)

    @jax.jit
    def run(p, x, g, memory):
        # The gradient of the output is g; dx comes as that of a parameter added to x.
        loss = lambda p, m: (f(p, x + p["dx"], memory=m) * g).sum()
        return msbp.value_and_grad(loss)(p, memory)[1:]

    return f, run


def results(sparsifier, backend, x, g, residual):
    f, run = step(sparsifier, backend)
    params = {"w": integers(9, M, N), "dx": np.zeros_like(x)}
    memory = f.init_memory(params, x)
    memory = jax.tree.map(lambda leaf: residual.reshape(leaf.shape), memory)
    grads, after = run(params, x, g, memory)
    return [np.asarray(result) for result in (grads["w"], grads["dx"], after["w"].residual)]


def padded(array, places, rows, fill):
    """Return rows put at certain places of an array that is `fill` elsewhere."""
    out = np.full((rows, *array.shape[1:]), fill, np.float32)
    out[places] = array
    return out


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["mean", "slot", "local"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_batch_is_the_batch_without_padding(backend, reduce):
    @hypothesis.settings(max_examples=CASES.get(backend, 1))
    @hypothesis.given(
        seed=st.integers(0, 99), rows=st.integers(1, 7), group=st.sampled_from([1, 2, 3, None]),
        behind=st.integers(0, 4), between=st.integers(0, 2), fill=st.sampled_from([0.0, 100.0, -1e30]),
    )  # fmt: skip
    def check(seed, rows, group, behind, between, fill):
        blocks = 2 if reduce == "local" else 1
        # Padding at the end, and whole groups of it in front; for one choice, or one a row, anywhere.
        in_front = between * (group or 1)
        places = in_front + np.arange(rows)
        if group in (1, None):
            places = np.sort(np.random.default_rng(seed).permutation(in_front + rows + behind)[:rows])
        size = in_front + rows + behind
        if reduce == "local" and group not in (1, None):
            size += -size % group
            rows_alone = rows + -rows % group  # blocks must be of whole groups without padding, too
        else:
            rows_alone = rows
        s = msbp.memorized(msbp.top_k(k=K, rows_per_group=group), 0.5, reduce=reduce,
                           **({"shards": blocks} if reduce == "local" else {}))  # fmt: skip
        parts = [(integers(seed + b, rows, M), live_rows(seed + b + 50, rows)) for b in range(blocks)]
        mine = lambda i, fill: np.concatenate([padded(part[i], places, size, fill) for part in parts])
        alone = lambda i: np.concatenate([padded(part[i], np.arange(rows), rows_alone, 0) for part in parts])
        slots = integers(7, size, N)
        shapes = {"mean": (N,), "local": (blocks, N)}
        residual = slots if reduce == "slot" else integers(7, *shapes[reduce])
        dw, dx, after = results(s, backend, mine(0, fill), mine(1, 0), residual)
        own = slots[places] if reduce == "slot" else residual
        want_dw, want_dx, want_after = results(s, backend, alone(0), alone(1), own)
        np.testing.assert_array_equal(dw, want_dw)
        taken = np.concatenate([b * size + places for b in range(blocks)])
        live = np.concatenate([b * rows_alone + np.arange(rows) for b in range(blocks)])
        np.testing.assert_array_equal(dx[taken], want_dx[live])
        idle = np.setdiff1d(np.arange(blocks * size), taken)
        assert not np.any(dx[idle])
        if reduce == "slot":
            np.testing.assert_array_equal(after[places], want_after)
            np.testing.assert_array_equal(after[idle], slots[idle])
        else:
            np.testing.assert_array_equal(after, want_after)

    if backend in CASES:
        check()
    else:
        check.hypothesis.inner_test(**INTERPRETED[backend, reduce])


@pytest.mark.parametrize("reduce", ["mean", "slot", "local"])
@pytest.mark.parametrize(
    "inner",
    [msbp.top_k(k=K, rows_per_group=2), msbp.random_k(k=K, rescale=True, rows_per_group=None), msbp.dense()],
    ids=str,
)
def test_where_nothing_takes_part_the_memory_stays(inner, reduce):
    shards = {"shards": 1} if reduce == "local" else {}
    s = msbp.memorized(inner, 0.5, reduce=reduce, **shards)
    g = jnp.zeros((6, N))
    state = jax.tree.map(
        lambda leaf: leaf + 1 if leaf.dtype == jnp.float32 else leaf, s.init(jax.ShapeDtypeStruct(g.shape, g.dtype))
    )
    p, after = jax.jit(s.apply)(g, state)
    assert not np.any(p.materialize())
    np.testing.assert_array_equal(after.residual, state.residual)
    p, after = jax.jit(s.apply)(-g, state)  # a zero with a sign is one, too
    assert not np.any(p.materialize())
    np.testing.assert_array_equal(after.residual, state.residual)


def test_nan_takes_part():
    g = jnp.zeros((4, N)).at[2, 3].set(jnp.nan)
    s = msbp.memorized(msbp.top_k(k=K), 0.5)
    state = s.init(g)._replace(residual=jnp.arange(N, dtype=jnp.float32))
    p, after = s.apply(g, state)
    dense = np.asarray(p.materialize())
    assert np.isnan(dense[2, 3])
    assert not dense[[0, 1, 3]].any()
    assert np.isfinite(after.residual).all()


S = msbp.memorized(msbp.top_k(k=K), 0.5)
W = random_gradient(0, 6, N)


def memory_after(function, sparsifier, *args, params=W):
    """Return gradients and memory of one step, from a memory that is not 0."""
    f = msbp.sparse_vjp(function, sparsifier, min_features=1)
    warm = random_gradient(5, 1, N)[0]
    memory = jax.tree.map(lambda leaf: jnp.broadcast_to(warm, leaf.shape), f.init_memory(params, *args))
    loss = lambda w, m, *args: f(w, *args, memory=m).sum()
    return jax.jit(msbp.value_and_grad(loss))(params, memory, *args)[1:]


def masked_steps(w, xs, mask):
    """Return the masked outputs of time steps: xs `[time, batch, m]`, mask `[time, batch]`."""
    step = lambda c, t: (c, jnp.sin(t[0] @ w) * t[1][:, None])
    return jax.lax.scan(step, None, (xs, mask))[1]


def test_sequences_of_different_lengths_count_by_their_steps():
    """The memory is the mean over the steps that are there, whatever the padded length."""
    lengths = np.array([5, 2, 1, 4])
    xs = random_gradient(1, 7 * 4, 6).reshape(7, 4, 6)
    mask = jnp.asarray(np.arange(7)[:, None] < lengths, jnp.float32)
    got = memory_after(masked_steps, S, xs, mask)
    junk = jnp.where(mask[..., None] > 0, xs, 100.0)
    assert_trees_equal(memory_after(masked_steps, S, junk, mask), got)
    assert_trees_close(memory_after(masked_steps, S, xs[:5], mask[:5]), got, rtol=1e-6)
    rows = xs.reshape(-1, 6)[mask.reshape(-1) > 0]
    assert_trees_close(memory_after(lambda w, x: jnp.sin(x @ w), S, rows), got)


def test_slots_of_sequences_are_means_over_the_steps_that_are_there():
    slot = msbp.memorized(msbp.top_k(k=K), 0.5, reduce="slot")
    lengths = np.array([5, 2, 0, 4])
    xs = random_gradient(1, 7 * 4, 6).reshape(7, 4, 6)
    mask = jnp.asarray(np.arange(7)[:, None] < lengths, jnp.float32)
    _, after = memory_after(masked_steps, slot, xs, mask)
    for example, length in enumerate(lengths):
        if length:
            one = xs[:length, example : example + 1]
            want = memory_after(masked_steps, slot, one, jnp.ones((length, 1)))[1]["params"].residual[0]
        else:
            want = random_gradient(5, 1, N)[0]  # as it was
        assert_trees_close(after["params"].residual[example], want, rtol=5e-5)


@pytest.mark.parametrize("group", [1, None])
def test_uneven_devices_count_by_their_rows(group):
    """In shard_map and under jit: the memory of all rows, though devices have more or less padding."""
    s = msbp.memorized(msbp.top_k(k=K, rows_per_group=group), 0.5)
    rows = np.zeros(32, bool)
    rows[[0, 1, 2, 3, 4, 9, 31]] = True
    mask = jnp.asarray(rows, jnp.float32)
    x = jnp.where(mask[:, None] > 0, random_gradient(2, 32, 6), 7.0)
    function = lambda w, x, mask: jnp.sin(x @ w) * mask[:, None]
    want = memory_after(function, s, x[rows], mask[rows])
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("d"), PartitionSpec()
    placed = [jax.device_put(a, jax.sharding.NamedSharding(mesh, split)) for a in (x, mask)]
    assert_trees_close(memory_after(function, s, *placed), want)
    if group == 1:  # each device of a shard_map chooses among its own rows
        for check in (True, False):
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=(whole, split, split), out_specs=split, check_vma=check
            )
            got = memory_after(mapped, s, x, mask)
            assert_trees_close(got[1], want[1])
            assert_trees_close(got[0], want[0])


def test_uses_and_members_count_by_their_rows():
    """Two calls with one memory, and a vmap over examples: as one call with the rows of all."""
    f = msbp.sparse_vjp(lambda w, x: jnp.sin(x @ w), S, min_features=1)
    x = random_gradient(3, 10, 6)
    memory = jax.tree.map(lambda leaf: leaf + 1, f.init_memory(W, x))
    step = lambda loss: jax.jit(msbp.value_and_grad(loss))(W, memory)[1:]
    whole = step(lambda w, m: f(w, x, memory=m).sum())
    apart = lambda w, m: f(w, x[:2], memory=m).sum() + f(w, x[2:], memory=m).sum()
    assert_trees_close(step(apart), whole)
    mask = jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], jnp.float32)
    places = np.cumsum(np.asarray(mask).reshape(-1)).astype(int) - 1
    spread = x[np.clip(places, 0, 9)].reshape(5, 4, 6)
    mapped = lambda w, m: (jax.vmap(lambda x: f(w, x, memory=m))(spread) * mask[..., None]).sum()
    assert_trees_close(step(mapped), whole)


def test_a_branch_under_vmap_counts_the_examples_that_took_it():
    """A cond under vmap is a select: what was not selected has a gradient of 0."""
    f = msbp.sparse_vjp(
        lambda w, x, p: jax.lax.cond(p, lambda: jnp.sin(x @ w), lambda: jnp.zeros((len(x), N))), S, min_features=1
    )
    xs = random_gradient(3, 12, 6).reshape(4, 3, 6)
    taken = jnp.array([True, False, True, False])
    memory = jax.tree.map(lambda leaf: leaf + 1, f.init_memory(W, xs[0], True))
    loss = lambda w, m: jax.vmap(lambda x, p: f(w, x, p, memory=m))(xs, taken).sum()
    _, after = msbp.value_and_grad(loss)(W, memory)[1:]
    g = msbp.sparse_vjp(lambda w, x: jnp.sin(x @ w), S, min_features=1)
    want = msbp.value_and_grad(lambda w, m: g(w, xs[taken].reshape(-1, 6), memory=m).sum())(W, memory)[2]
    assert_trees_close(after, want)


def test_a_microbatch_of_padding_leaves_the_memory_to_the_others():
    f = msbp.sparse_vjp(lambda w, x: jnp.sin(x @ w), S, min_features=1)
    x, mask = random_gradient(3, 12, 6), jnp.repeat(jnp.array([1.0, 0.0, 1.0]), 4)
    memory = f.init_memory(W, x)
    loss = lambda w, m, x, mask: (f(w, x, memory=m) * mask[:, None]).sum()
    _, grads, after = msbp.value_and_grad(loss, microbatches=3)(W, memory, x, mask)
    rest = mask > 0
    _, want, want_after = msbp.value_and_grad(loss, microbatches=2)(W, memory, x[rest], mask[rest])
    assert_trees_close((3 * grads, after), (2 * want, want_after))


def test_other_numbers_in_a_state_count_by_rows_too():
    """A user's running mean: over two calls it is weighted by the rows that take part in each."""

    def apply(u, state):
        live = jnp.any(u != 0, axis=1)
        norm = jnp.sqrt((u**2).sum(axis=1))
        mean = norm.sum() / jnp.maximum(live.sum(), 1).astype(norm.dtype)
        return msbp.take_columns(u, jnp.arange(K, dtype=jnp.int32)[None], rows_per_group=None), {"norm": mean}

    s = msbp.Sparsifier(init=lambda aval: {"norm": jnp.zeros(())}, apply=apply, name="norms")
    f = msbp.sparse_vjp(lambda w, x: x @ w, s, min_features=1)
    g = random_gradient(6, 8, N).at[5:].set(0)
    x = random_gradient(7, 8, 6)
    memory = f.init_memory(W, x)
    loss = lambda w, m: (f(w, x[:2], memory=m) * g[:2]).sum() + (f(w, x[2:], memory=m) * g[2:]).sum()
    after = msbp.value_and_grad(loss)(W, memory)[2]
    np.testing.assert_allclose(after["params"]["norm"], jnp.sqrt((g[:5] ** 2).sum(1)).mean(), rtol=1e-5)


def test_random_choices_keep_their_distribution():
    """Whatever rows take part, each feature is drawn alike, and the rescaled draw is unbiased."""
    s = msbp.random_k(k=6, rescale=True, rows_per_group=2)
    u = random_gradient(1, 6, N).at[1::2].set(0)
    state = s.init(jax.ShapeDtypeStruct(u.shape, u.dtype))

    def draw(state, _):
        p, state = s.apply(u, state)
        return state, p.materialize()

    draws = np.asarray(jax.lax.scan(draw, state, None, length=3000)[1], np.float64)
    assert not draws[:, 1::2].any()
    hits = (draws[:, ::2] != 0).mean(0)
    assert np.abs(hits - 6 / N).max() < 5 * (6 / N * (1 - 6 / N) / 3000) ** 0.5
    error = np.abs(draws.mean(0) - np.asarray(u, np.float64))
    assert (error <= 5 * draws.std(0) / 3000**0.5 + 1e-6).all()


@functools.cache
def padded_tagger():
    """Return a recurrent tagger over padded sequences, as the examples have it: inputs, lengths, loss."""
    import flax.linen as nn

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, x, lengths):
            return nn.Dense(N)(nn.RNN(nn.LSTMCell(16))(x, seq_lengths=lengths))

    return Tagger()


def test_a_recurrent_model_with_seq_lengths():
    """What stands behind the end of a sequence is immaterial to gradients and memory."""
    model = msbp.sparse_vjp(padded_tagger(), msbp.memorized(msbp.top_k(k=K), 0.5), min_features=1)
    x = random_gradient(1, 3 * 6, 5).reshape(3, 6, 5) / 4
    lengths = jnp.array([6, 2, 3])
    there = jnp.asarray(np.arange(6) < np.asarray(lengths)[:, None], jnp.float32)
    params = model.init(jax.random.key(0), x, lengths)
    memory = model.init_memory(params, x, lengths)
    assert len(memory) == 9

    @jax.jit
    def run(memory, x):
        loss = lambda p, m: (jnp.sin(model.apply(p, x, lengths, memory=m)) * there[..., None]).sum() / there.sum()
        return msbp.value_and_grad(loss)(params, memory)[1:]

    _, memory = run(memory, x)
    got = run(memory, x)
    assert_trees_close(run(memory, jnp.where(there[..., None] > 0, x, 3.0)), got, rtol=1e-6)
    assert all(float(jnp.abs(state.residual).sum()) > 0 for state in got[1].values())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("xla", "native")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exactly_0_is_told_by_the_bits(backend, dtype):
    """Numbers too small to be normal, which XLA takes for 0 on a CPU, are none: on every backend alike."""
    g = jnp.ones((4, N), dtype).at[0].set(0).at[0, 3].set(1e-40).at[2].set(0).at[3].set(-0.0)
    where = msbp.Where(rows=4, n=N, m=1, dtype=dtype, backend=backend)
    sparsifier = msbp.memorized(msbp.top_k(k=K), decay=1.0).at(where)
    state = sparsifier.init(jax.ShapeDtypeStruct(g.shape, g.dtype))._replace(residual=jnp.ones(N))
    p, after = sparsifier.apply(g, state)
    assert p.materialize().any(axis=1).tolist() == [True, True, False, False]
    assert after.residual.sum() == (N - K) * (1 + 2) / 2
