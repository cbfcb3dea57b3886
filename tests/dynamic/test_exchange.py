"""RigL and SET: which entries give way to which, against plain NumPy; what moments do; compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import msbp_jax as msbp
from msbp_jax.weights import pattern_of, scattered
from msbp_jax.weights._pattern import check_pattern

KEY = jax.random.key(0)
PARTS = ("starts", "inputs", "input_starts", "features", "order")


def exchanged(mask, w, scores, share, regrow):
    """Return the mask and the weights after an exchange: one layer, a matrix, place by place."""
    count = int(np.floor(np.float32(share) * np.float32(mask.sum())))
    if not regrow:
        count = min(count, (~mask).sum())
    places = [(i, o) for o in range(mask.shape[1]) for i in range(mask.shape[0])]
    there = [place for place in places if mask[place]]
    dropped = sorted(there, key=lambda place: abs(w[place]))[:count]
    kept = [place for place in there if place not in dropped]
    free = [place for place in places if place not in (kept if regrow else there)]
    grown = sorted(free, key=lambda place: -scores[place])[:count]
    new, values = np.zeros_like(mask), np.zeros_like(w)
    for place in [*kept, *grown]:
        new[place] = True
        values[place] = w[place] if mask[place] else 0
    return new, values


def sparse_of(mask, w, stacked):
    variables = {"params": {"blocks": {"kernel": jnp.asarray(w)}}}
    return msbp.prune(
        variables, masks={"blocks": {"kernel": mask}}, stacked=["blocks/*"] if stacked else (), input_axes={"*": 1}
    )


@settings(max_examples=14)
@given(
    st.booleans(),
    st.booleans(),
    st.just((3, 5, 9)),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_an_exchange_is_that_of_numpy(regrow, stacked, size, share, seed):
    """Small whole numbers, so that there are ties; layers with unequal numbers of entries, so that there is padding."""
    rng = np.random.default_rng(seed)
    *size, entries = size
    shape = (3, *size) if stacked else tuple(size)
    order = rng.random((3 if stacked else 1, size[0] * size[1])).argsort(axis=1)
    mask = (order < np.asarray([entries, 1, entries - 2])[: len(order), None]).reshape(shape)
    w = rng.integers(-3, 4, shape).astype(np.float32)
    scores = rng.integers(-3, 4, shape).astype(np.float32)
    sparse, tx = sparse_of(mask, w, stacked), optax.sgd(0.1, momentum=0.9)
    opt_state = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), tx.init(sparse["params"]))
    if regrow:
        schedule = msbp.rigl(every=2, until=100, fraction=lambda step: share)
        state = schedule.init(sparse)
    else:
        schedule = msbp.sparse_evolution(every=2, fraction=share)
        state = schedule.init(sparse, KEY)
        key = jax.random.split(jax.random.fold_in(KEY, 2), 1)[0]
        scores = np.asarray(jax.random.uniform(key, shape))
    dense_grad_fn = lambda dense: jax.tree.map(lambda leaf: jnp.asarray(scores).reshape(leaf.shape), dense)
    same, same_state, state = schedule.update(tx, sparse, opt_state, state, dense_grad_fn)
    jax.tree.map(np.testing.assert_array_equal, (same, same_state), (dict(sparse), opt_state))
    assert bool(schedule.due(state))
    found, moved, state = schedule.update(tx, sparse, opt_state, state, dense_grad_fn)
    assert int(state.step) == 2
    pattern = found["sparsity"]["blocks"]["kernel"]
    check_pattern(pattern, "w")
    layers = [array.reshape(-1, *size) for array in (mask, w, np.abs(scores))]
    wanted = [exchanged(*layer, share, regrow) for layer in zip(*layers, strict=True)]
    new = np.stack([m for m, _ in wanted]).reshape(shape)
    values = np.stack([v for _, v in wanted]).reshape(shape)
    expected = pattern_of(new, stacked=int(stacked))
    for part in PARTS:
        np.testing.assert_array_equal(getattr(pattern, part), getattr(expected, part))
        assert getattr(pattern, part).dtype == jnp.int32
    np.testing.assert_array_equal(msbp.densify(found)["params"]["blocks"]["kernel"], values)
    trace = moved[0].trace["blocks"]["kernel"]
    np.testing.assert_array_equal(scattered(pattern, trace), np.where(new & mask, 7, 0))
    padding = np.asarray(pattern.features_by_entry()) == size[1]
    assert not np.asarray(trace)[padding].any()
    assert not np.asarray(found["params"]["blocks"]["kernel"])[padding].any()


def test_many_exchanges_keep_the_numbers_and_the_rest():
    """The same layer for a long time: nnz, order and bits of what stays."""
    w = np.asarray(jax.random.normal(KEY, (2, 9, 8)))
    mask = np.abs(w) > 1
    sparse, tx = sparse_of(mask, w, True), optax.sgd(0.1, momentum=0.9)
    schedule = msbp.sparse_evolution(every=1, fraction=0.4)
    opt_state, state = tx.init(sparse["params"]), schedule.init(sparse, KEY)

    @jax.jit
    def step(variables, opt_state, state, noise):
        move = lambda leaf: leaf + noise
        variables = {**variables, "params": jax.tree.map(move, variables["params"])}
        before = variables, jax.tree.map(move, opt_state)
        return *before, *schedule.update(tx, *before, state)

    for i in range(20):
        old, old_state, sparse, opt_state, state = step(sparse, opt_state, state, jnp.float32(1 + i))
        pattern, before = sparse["sparsity"]["blocks"]["kernel"], old["sparsity"]["blocks"]["kernel"]
        check_pattern(pattern, "w")
        np.testing.assert_array_equal(pattern.starts[:, -1], mask.sum((1, 2)))
        both = np.asarray(pattern.mask() & before.mask())
        assert (both.sum((1, 2)) == mask.sum((1, 2)) - np.floor(0.4 * mask.sum((1, 2)))).all()
        for new_leaf, old_leaf in (
            (sparse["params"]["blocks"]["kernel"], old["params"]["blocks"]["kernel"]),
            (opt_state[0].trace["blocks"]["kernel"], old_state[0].trace["blocks"]["kernel"]),
        ):
            kept = np.where(both, scattered(before, old_leaf), 0)
            np.testing.assert_array_equal(scattered(pattern, new_leaf), kept)
    assert step._cache_size() == 1


def test_new_places_are_drawn_alike():
    w = jnp.arange(1.0, 13.0).reshape(3, 4)
    mask = np.asarray(w) > 8
    sparse = msbp.prune({"params": w}, masks=mask)
    schedule, tx = msbp.sparse_evolution(every=1, fraction=0.5), optax.sgd(0.1)
    opt_state = tx.init(sparse["params"])

    def one(key):
        state = schedule.init(sparse, key)
        return schedule.update(tx, sparse, opt_state, state)[0]["sparsity"]["params"].mask()

    drawn = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 800))).mean(0)
    np.testing.assert_array_equal(drawn.ravel()[8:], [0, 0, 1, 1])  # 9 and 10 were dropped, and are not drawn
    assert abs(drawn.ravel()[:8] - 2 / 8).max() < 5 * (0.25 * 0.75 / 800) ** 0.5


def test_a_weight_that_is_nearly_full():
    w = jnp.arange(1.0, 13.0).reshape(3, 4)
    sparse = msbp.prune({"params": w}, masks=np.asarray(w) > 1)
    schedule, tx = msbp.sparse_evolution(every=1, fraction=0.5), optax.sgd(0.1)
    found, _, _ = schedule.update(tx, sparse, tx.init(sparse["params"]), schedule.init(sparse, KEY))
    np.testing.assert_array_equal(msbp.densify(found)["params"], np.where(w == 2, 0, np.where(w == 1, 0, w)))
    assert bool(found["sparsity"]["params"].mask()[0, 0])


def test_the_share_of_rigl_decays_by_a_cosine():
    schedule = msbp.rigl(every=10, until=100, fraction=0.4)
    steps = np.arange(0, 101, 10)
    want = 0.2 * (1 + np.cos(np.pi * steps / 100))
    np.testing.assert_allclose([schedule.share(jnp.int32(step)) for step in steps], want, atol=1e-7)
    due = [step for step in range(1, 130) if bool(schedule.due(msbp.SparsityState(jnp.int32(step - 1), {})))]
    assert due == list(range(10, 100, 10))


def network(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def problem(schedule, tx, count=None):
    """Return a training step with a schedule, and what it starts from; `count` is called with each dense gradient."""
    keys = jax.random.split(KEY, 5)
    dense = {
        "a": {"kernel": jax.random.normal(keys[0], (12, 16)), "bias": jnp.zeros((1, 16))},
        "b": {"kernel": jax.random.normal(keys[1], (16, 3))},
    }
    variables = msbp.prune({"params": dense}, density=0.25, method="random", scope="erdos_renyi", key=keys[2])
    x = jax.random.normal(keys[3], (32, 12))
    y = jnp.sin(x @ jax.random.normal(keys[4], (12, 3)))
    model = msbp.sparse_weights(network)
    loss_fn = lambda params, sparsity, x: ((model(params, sparsity, x) - y) ** 2).mean()

    def step(variables, opt_state, state, x):
        def dense_grad_fn(dense):
            if count is not None:
                jax.debug.callback(count)
            return jax.grad(lambda dense: ((network(dense, x) - y) ** 2).mean())(dense)

        loss, grads = jax.value_and_grad(loss_fn)(variables["params"], variables["sparsity"], x)
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        variables = {**variables, "params": optax.apply_updates(variables["params"], updates)}
        return *schedule.update(tx, variables, opt_state, state, dense_grad_fn), loss

    return step, variables, tx.init(variables["params"]), x


@pytest.mark.filterwarnings("ignore:.*donated")
def test_a_step_is_compiled_once_and_the_dense_gradient_is_computed_when_due():
    called = []
    tx, schedule = optax.sgd(0.1, momentum=0.9), msbp.rigl(every=7, until=45, fraction=0.3)
    step, variables, opt_state, x = problem(schedule, tx, lambda: called.append(1))
    jitted, state = jax.jit(step), schedule.init(variables)
    first, counts, losses = variables["sparsity"], [], []
    for _ in range(50):
        variables, opt_state, state, loss = jitted(variables, opt_state, state, x)
        jax.effects_barrier()
        counts.append(len(called))
        losses.append(float(loss))
    assert jitted._cache_size() == 1
    assert counts == [min(step // 7, 6) for step in range(1, 51)]
    assert losses[-1] < 0.5 * losses[0]
    assert (np.asarray(first["a"]["kernel"].mask()) != np.asarray(variables["sparsity"]["a"]["kernel"].mask())).any()
    assert int(state.step) == 50


def test_eager_compiled_and_scanned_steps_are_the_same():
    tx, schedule = optax.sgd(0.1, momentum=0.9), msbp.rigl(every=2, until=100)
    step, *start, x = problem(schedule, tx)
    start = (*start, schedule.init(start[0]))
    eager = compiled = start
    jitted = jax.jit(step)
    for _ in range(4):
        eager = step(*eager, x)[:3]
        compiled = jitted(*compiled, x)[:3]
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(lambda carry, _: (step(*carry, x)[:3], None), carry, length=4))(
        start
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for other in (eager, scanned):
        jax.tree.map(close, other[0]["params"], compiled[0]["params"])
        jax.tree.map(np.testing.assert_array_equal, other[0]["sparsity"], compiled[0]["sparsity"])
        jax.tree.map(close, other[1], compiled[1])
    changed = start[0]["sparsity"]["a"]["kernel"].mask() != compiled[0]["sparsity"]["a"]["kernel"].mask()
    assert np.asarray(changed).any()


def test_gradients_that_are_not_finite_choose_nothing():
    w = jnp.arange(1.0, 13.0).reshape(3, 4)
    sparse = msbp.prune({"params": w}, masks=np.asarray(w) > 8)
    schedule, tx = msbp.rigl(every=1, until=9, fraction=lambda step: 0.25), optax.sgd(0.1)
    grads = jnp.full((3, 4), jnp.nan).at[1, 2].set(-0.5).at[0, 1].set(jnp.inf)
    found, _, _ = schedule.update(tx, sparse, tx.init(sparse["params"]), schedule.init(sparse), lambda dense: grads)
    assert np.argwhere(np.asarray(found["sparsity"]["params"].mask()))[0].tolist() == [1, 2]


@pytest.mark.parametrize("worth", [0.0, np.nan, np.inf])
def test_where_nothing_has_a_gradient_nothing_changes(worth):
    """What was dropped comes back, and places at the beginning are not preferred."""
    w = jnp.arange(1.0, 13.0).reshape(3, 4)
    sparse = msbp.prune({"params": w}, masks=np.asarray(w) > 8)
    schedule, tx = msbp.rigl(every=1, until=9, fraction=lambda step: 0.5), optax.sgd(0.1, momentum=0.9)
    opt_state = jax.tree.map(jnp.ones_like, tx.init(sparse["params"]))
    grads = jnp.full((3, 4), worth)
    found, moved, _ = schedule.update(tx, sparse, opt_state, schedule.init(sparse), lambda dense: grads)
    jax.tree.map(np.testing.assert_array_equal, (found, moved), (dict(sparse), opt_state))


def test_weights_that_are_not_numbers_stay():
    """And padding of a stacked layer never takes their place."""
    w = jnp.stack([jnp.arange(1.0, 13.0).reshape(3, 4), jnp.ones((3, 4))]).at[0, 2, 3].set(jnp.nan)
    masks = np.stack([np.arange(12).reshape(3, 4) > 4, np.arange(12).reshape(3, 4) > 2])
    sparse = msbp.prune({"params": w}, masks=masks, stacked=["*"])
    schedule, tx = msbp.sparse_evolution(every=1, fraction=1.0), optax.sgd(0.1)
    state = schedule.init(sparse, jax.random.key(0))
    found, _, _ = schedule.update(tx, sparse, tx.init(sparse["params"]), state)
    assert found["sparsity"]["params"].mask().sum(axis=(1, 2)).tolist() == [7, 9]


def test_what_was_dropped_may_grow_again_and_stays():
    """As in the authors' code: the largest gradient is that of the smallest weight."""
    w = jnp.arange(1.0, 13.0).reshape(3, 4)
    sparse = msbp.prune({"params": w}, masks=np.asarray(w) > 8)
    schedule, tx = msbp.rigl(every=1, until=9, fraction=lambda step: 0.25), optax.sgd(0.1, momentum=0.9)
    opt_state = jax.tree.map(jnp.ones_like, tx.init(sparse["params"]))
    grads = jnp.zeros((3, 4)).at[2, 0].set(1.0)
    found, moved, _ = schedule.update(tx, sparse, opt_state, schedule.init(sparse), lambda dense: grads)
    jax.tree.map(np.testing.assert_array_equal, (found, moved), (dict(sparse), opt_state))


def test_static_sparsity_counts_and_changes_nothing():
    schedule, tx = msbp.static_sparsity(), optax.sgd(0.1)
    step, variables, opt_state, x = problem(schedule, tx)
    state, sparsity = schedule.init(variables), variables["sparsity"]
    for _ in range(3):
        variables, opt_state, state, _ = jax.jit(step)(variables, opt_state, state, x)
    assert int(state.step) == 3
    assert not schedule.due(state)
    jax.tree.map(np.testing.assert_array_equal, variables["sparsity"], sparsity)
