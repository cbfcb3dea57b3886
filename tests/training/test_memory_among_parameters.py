"""A memory among the parameters, whose gradient is the next one: Flax's own TrainState carries it."""

import functools

import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

OWG = "_overwrite_with_gradient"
X = jax.random.normal(jax.random.key(0), (16, 32))
Y = jax.random.normal(jax.random.key(1), (16, 80))
MEMORIZED = msbp.memorized(msbp.top_k(k=6, rows_per_group=4), 0.8)
NOISY = msbp.memorized(msbp.random_k(k=6, rows_per_group=4, key=jax.random.key(7)), 0.8)


class Net(nn.Module):
    """Two layers, the first of which is normalized."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x)))
        return nn.Dense(80)(x)


class State(flax.training.train_state.TrainState):
    """As in Flax's ImageNet example."""

    batch_stats: dict


def flax_step(state, x, y):
    """What such programs have, word by word."""

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        y_hat, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        return ((y_hat - y) ** 2).mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), loss


def flax_state(model, variables):
    params = model.with_memory(variables, X, train=False)
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9))
    return State.create(apply_fn=model.apply, params=params, tx=tx, batch_stats=variables["batch_stats"])


def memory_of(params, site):
    return {name: leaf["total"] / leaf["weight"] for name, leaf in params[OWG]["msbp_memory"][site].items()}


@pytest.mark.parametrize("decay", [0.8, optax.linear_schedule(0.9, 0.3, 3)])
def test_is_the_explicit_memory(decay):
    """Flax's own step and TrainState, unchanged, train as with the memory passed by hand."""
    model = msbp.sparse_vjp(Net(), msbp.memorized(msbp.top_k(k=6, rows_per_group=4), decay))
    variables = model.init(jax.random.key(2), X)
    state, step = flax_state(model, variables), jax.jit(lambda *args: flax_step(*args))
    params, batch_stats, memory = (
        variables["params"],
        variables["batch_stats"],
        model.init_memory(variables, X, train=False),
    )
    opt_state = state.tx.init(params)

    def loss_fn(params, memory, x, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        y_hat, updates = model.apply(variables, x, mutable=["batch_stats"], memory=memory)
        return ((y_hat - Y) ** 2).mean(), updates

    explicit = jax.jit(msbp.value_and_grad(loss_fn, has_aux=True))

    for scale in (1.0, 2.0, 0.5, 1.0):
        (want, updates), grads, memory = explicit(params, memory, X * scale, batch_stats)
        batch_stats = updates["batch_stats"]
        updates, opt_state = state.tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, loss = step(state, X * scale, Y)
        assert loss == pytest.approx(float(want), rel=1e-5)
    assert step._cache_size() == 2  # as without memory: at first, Flax's count of steps is a Python number
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), state.params["params"], params)
    for site, own in memory.items():
        np.testing.assert_allclose(memory_of(state.params, site)["residual"], own.residual, rtol=1e-4, atol=1e-7)
        assert np.any(own.residual)


def test_evaluation_is_plain():
    model = msbp.sparse_vjp(Net(), MEMORIZED)
    variables = model.init(jax.random.key(2), X)
    whole = {"params": model.with_memory(variables, X, train=False), "batch_stats": variables["batch_stats"]}
    want = Net().apply(variables, X, train=False)
    assert_trees_equal(model.apply(whole, X, train=False), want)
    assert_trees_equal(model.bind(whole)(X, train=False), want)
    assert str(model.report(whole, X, train=False)) == str(model.report(variables, X, train=False))
    assert_trees_equal(model.init_memory(whole, X, train=False), model.init_memory(variables, X, train=False))


def f_of(sparsifier):
    return msbp.sparse_vjp(lambda p, x: jnp.tanh(x @ p["v"]) @ p["w"], sparsifier)


PARAMS = {"v": jax.random.normal(jax.random.key(3), (32, 64)), "w": jax.random.normal(jax.random.key(4), (64, 80))}


@functools.partial(msbp.sparse_vjp, plan=MEMORIZED)
def only_if(p, go):
    return jax.lax.cond(go, lambda: ((jnp.tanh(X @ p["v"]) @ p["w"]) ** 2).mean(), lambda: 0.0)


def loss_of(f):
    return lambda p, x: (f(p, x) ** 2).mean()


def test_what_happens_to_all_gradients_leaves_it_right():
    """Scales, sums and means of gradients: a total and a weight have the same quotient."""
    f = f_of(MEMORIZED)
    carried = f.with_memory(PARAMS, X)
    grad = jax.jit(jax.grad(loss_of(f)))
    one, other = grad(carried, X), grad(carried, 2 * X)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, memory_of(one, "w"), memory_of(other, "w"))
    assert_trees_close(memory_of(jax.tree.map(lambda a: a * 1e-3, one), "w"), memory_of(one, "w"))
    assert_trees_close(memory_of(jax.tree.map(jnp.add, one, other), "w"), mean)
    twice = jax.grad(lambda p: loss_of(f)(p, X) + loss_of(f)(p, 2 * X))(carried)  # two calls in one loss
    assert_trees_close(memory_of(twice, "w"), mean)
    each = jax.vmap(grad, (None, 0))(carried, jnp.stack([X, 2 * X]))
    assert_trees_close(memory_of(jax.tree.map(lambda a: a.mean(axis=0), each), "w"), mean)
    follows, want = grad(carried | {OWG: one[OWG]}, X), grad(carried | {OWG: jax.tree.map(jnp.add, one, one)[OWG]}, X)
    assert_trees_close(follows, want)
    assert not np.allclose(follows["params"]["v"], one["params"]["v"])  # the memory is used


def test_random_keys_move():
    """Every step and every site draws with a key of its own; a sum of gradients is a step too."""
    f = f_of(NOISY)
    tree, drawn, grad = f.with_memory(PARAMS, X), [], jax.jit(jax.grad(loss_of(f)))
    for _ in range(3):
        gradient = grad(tree, X)
        drawn.append(np.flatnonzero(np.asarray(gradient["params"]["w"]).any(axis=0)))
        tree = {"params": PARAMS, OWG: jax.tree.map(lambda a: 3 * a, gradient[OWG])}
    assert len({tuple(columns) for columns in drawn}) == 3
    assert [float(memory_of(tree, site)["inner/key"]) for site in ("v", "w")] == [3, 3]
    assert_trees_equal(grad(f.with_memory(PARAMS, X), X), grad(f.with_memory(PARAMS, X), X))


def test_what_is_not_reached_stays():
    """A branch that is not taken, a site of another method, a loss that does without: the memory is as it was."""
    f = f_of(MEMORIZED)
    carried = jax.grad(loss_of(f))(f.with_memory(PARAMS, X), X)
    carried = {"params": PARAMS, OWG: jax.tree.map(lambda a: 5 * a, carried[OWG])}
    branched = jax.jit(jax.grad(only_if))(carried, jnp.asarray(False))
    for site in ("v", "w"):
        assert_trees_close(memory_of(branched, site), memory_of(carried, site))
    part = msbp.sparse_vjp(lambda p, x: x @ p["v"], MEMORIZED)
    gradient = jax.grad(loss_of(part))(carried, X)
    assert_trees_close(memory_of(gradient, "w"), memory_of(carried, "w"))
    assert not np.allclose(memory_of(gradient, "v")["residual"], memory_of(carried, "v")["residual"])


def test_microbatches_hand_it_on():
    f = f_of(MEMORIZED)
    carried = f.with_memory(PARAMS, X[:8])
    _, whole, _ = msbp.value_and_grad(lambda p, memory, x: loss_of(f)(p, x), microbatches=2)(carried, {}, X)
    first = jax.grad(loss_of(f))(carried, X[:8])
    second = jax.grad(loss_of(f))({"params": PARAMS, OWG: first[OWG]}, X[8:])
    assert_trees_close(memory_of(whole, "w"), memory_of(second, "w"))


def test_beside_what_flax_overwrites():
    class Float8(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(80)(nn.relu(nn.Dense(64, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)))

    model = msbp.sparse_vjp(Float8(), MEMORIZED)
    variables = model.init(jax.random.key(2), X)
    carried = model.with_memory(variables, X)
    assert set(carried[OWG]) == {"Dense_1", "msbp_memory"}
    gradient = jax.grad(lambda p: (model.apply(p, X) ** 2).mean())(carried)
    want = msbp.value_and_grad(lambda p, m: (model.apply(p, X, memory=m) ** 2).mean())(
        variables, model.init_memory(variables, X)
    )
    assert_trees_close({**gradient, OWG: {"Dense_1": gradient[OWG]["Dense_1"]}}, want[1])


def test_refuses():
    f, model = f_of(MEMORIZED), msbp.sparse_vjp(Net(), MEMORIZED)
    carried, memory = f.with_memory(PARAMS, X), f.init_memory(PARAMS, X)
    with pytest.raises(ValueError, match="is given two memories, one by memory= and one among its parameters"):
        f(carried, X, memory=memory)
    variables = model.init(jax.random.key(2), X)
    with pytest.raises(ValueError, match="Net is given two memories"):
        model.apply(
            model.with_memory(variables, X, train=False), X, memory=model.init_memory(variables, X, train=False)
        )
    other = f_of(msbp.memorized(msbp.top_k(k=6), 0.8, reduce="slot")).with_memory(PARAMS, X)
    with pytest.raises(ValueError, match="memory of site v among the parameters is of another model, plan or batch"):
        f(other, X)
    with pytest.raises(ValueError, match="lacks the sites"):
        f({"params": PARAMS, OWG: {"msbp_memory": {"v": carried[OWG]["msbp_memory"]["v"]}}}, X)
    with pytest.raises(ValueError, match="cannot leave the backward pass"):
        jax.grad(lambda p: loss_of(f)(carried | {"params": p}, X))(PARAMS)
