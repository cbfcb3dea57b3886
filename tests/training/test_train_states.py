"""States with fields of a user's own, as Flax's examples have them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

S = msbp.memorized(msbp.top_k(k=6), decay=0.8)
X = jax.random.normal(jax.random.key(0), (16, 8))


class WithStatistics(msbp.TrainState):
    """A state with fields that have no default, in the manner of Flax's ImageNet example."""

    batch_stats: Any
    key: jax.Array
    epoch: int = 0


class Net(nn.Module):
    """A layer with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x))
        return nn.Dense(64)(nn.Dropout(0.5, deterministic=not train)(x))


def created():
    model = msbp.sparse_vjp(Net(), S)
    variables = model.init(jax.random.key(1), X, train=False)
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    state = WithStatistics.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(0.1, momentum=0.9),
        memory=model.init_memory(variables, X, **options),
        batch_stats=variables["batch_stats"],
        key=jax.random.key(3),
    )
    return model, state


def by_hand(state, x):
    """A step as in Flax's example, with the memory beside the gradients."""

    def loss(params, memory, x):
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, changed = state.apply_fn(
            variables,
            x,
            train=True,
            memory=memory,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
        )
        return (y**2).mean(), changed["batch_stats"]

    (value, statistics), grads, memory = msbp.value_and_grad(loss, has_aux=True)(state.params, state.memory, x)
    return state.apply_gradients(grads=grads, memory=memory, batch_stats=statistics), value


def test_a_subclass_with_fields_without_default():
    _, state = created()
    assert state.epoch == 0
    step = jax.jit(by_hand)
    first, _ = step(state, X)
    second, _ = step(first, X)
    assert int(second.step) == 2
    assert not jnp.array_equal(second.batch_stats["BatchNorm_0"]["mean"], state.batch_stats["BatchNorm_0"]["mean"])
    assert second.memory["Dense_0/kernel"].residual.any()
    assert second.replace(epoch=3).epoch == 3
    eager, _ = by_hand(state, X)
    assert_trees_close(eager.params, first.params, floor=1e-2)


def test_train_step_keeps_fields_it_knows_nothing_of():
    model, state = created()

    def loss(params, memory, x):
        variables = {"params": params, "batch_stats": statistics}
        return (model.apply(variables, x, train=False, memory=memory) ** 2).mean()

    statistics, key = jax.tree.map(jnp.copy, (state.batch_stats, state.key))
    after, _ = msbp.train_step(loss)(state, X)
    assert type(after) is WithStatistics
    assert_trees_equal(after.batch_stats, statistics)
    assert (jax.random.key_data(after.key) == jax.random.key_data(key)).all()
    assert after.tx is state.tx


def test_a_state_without_memory_field_given_is_made_as_flax_makes_it():
    state = msbp.TrainState.create(apply_fn=None, params={"w": X}, tx=optax.sgd(0.1))
    assert state.memory is None
    assert_trees_close(state.apply_gradients(grads={"w": X}).params["w"], X * 0.9)


def test_a_key_among_the_parameters_is_refused():
    with pytest.raises(TypeError, match=r"Parameter k is a PRNG key, which no optimizer takes\. Keep it in a fiel"):
        msbp.TrainState.create(apply_fn=None, params={"w": X, "k": jax.random.key(0)}, tx=optax.sgd(0.1))
