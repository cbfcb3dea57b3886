"""Schedules of NNX models: what the functions do with the same arrays, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import msbp_jax as msbp

X = jax.random.normal(jax.random.key(0), (20, 12))


@pytest.fixture(autouse=True)
def _as_optax_has_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


def loss(model):
    return jnp.mean(jnp.square(model(X) - jnp.sin(X[:, :4])))


def made(tx, density=None):
    model = msbp.sparse_weights(MLP(nnx.Rngs(0)))
    if density is not None:
        model.prune(density=density)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_rigl_in_a_compiled_step_is_that_of_the_function():
    tx, schedule = optax.adam(1e-2), msbp.rigl(every=2, until=40)
    model, optimizer = made(tx, 0.25)
    variables = model.sparse_variables()
    opt_state, state = tx.init(variables["params"]), schedule.init(variables)
    before = variables["sparsity"]["module/layers/0/kernel"]
    graphdef = nnx.graphdef(MLP(nnx.Rngs(0)))
    plain = lambda params: loss(nnx.merge(graphdef, params["module"]))
    sparse = msbp.sparse_weights(plain)

    @nnx.jit
    def step(model, optimizer, state):
        optimizer.update(model, nnx.grad(loss)(model))
        return model.update_sparsity(schedule, optimizer, state, nnx.grad(loss))

    @jax.jit
    def of_arrays(variables, opt_state, state):
        grads = jax.grad(sparse)(variables["params"], variables["sparsity"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        variables = {**variables, "params": optax.apply_updates(variables["params"], updates)}
        return schedule.update(tx, variables, opt_state, state, jax.grad(plain))

    nnx_state = state
    for _ in range(5):
        nnx_state = step(model, optimizer, nnx_state)
        variables, opt_state, state = of_arrays(variables, opt_state, state)
    assert int(nnx_state.step) == 5
    found = model.sparse_variables()
    jax.tree.map(np.testing.assert_array_equal, found["sparsity"], variables["sparsity"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found["params"], variables["params"])
    jax.tree.map(close, nnx.as_pure(optimizer.opt_state), opt_state)
    assert (np.asarray(found["sparsity"]["module/layers/0/kernel"].mask()) != np.asarray(before.mask())).any()
    schedule.check(found, nnx_state)


def test_gradual_pruning_from_a_dense_model():
    schedule = msbp.gradual_pruning(stages={2: 0.5, 4: 0.25})
    model, optimizer = made(optax.sgd(0.1, momentum=0.9))
    state = schedule.init(model.sparse_variables())

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    sizes, start = [], float(loss(model))
    for _ in range(5):
        step(model, optimizer)
        state = model.update_sparsity(schedule, optimizer, state)
        sizes.append(model.module.layers[0].kernel.get_value().size)
        trace = nnx.as_pure(optimizer.opt_state)[0].trace["module"]["layers"][0]["kernel"]
        assert trace.size == sizes[-1]
    assert sizes == [192, 96, 96, 48, 48]
    assert sorted(model.sparsity) == ["layers/0/kernel", "layers/1/kernel"]
    assert float(loss(model)) < start
    dense = nnx.clone(model).densify()
    np.testing.assert_allclose(model(X), dense(X), rtol=1e-4, atol=1e-5)
