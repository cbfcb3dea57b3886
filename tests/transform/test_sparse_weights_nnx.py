"""NNX modules with sparse weights, pruned in place, against the dense twin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import msbp_jax as msbp
from msbp_jax.testing import random_gradient
from msbp_jax.weights import gathered

X = random_gradient(0, 20, 32)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(32, 48, rngs=rngs), nnx.Linear(48, 10, rngs=rngs)])
        self.norm = nnx.BatchNorm(48, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.norm(self.layers[0](x))))


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


def twins(density=0.2):
    """Return a sparse model and a dense one of the same weights."""
    model = msbp.sparse_weights(MLP(nnx.Rngs(0)))
    model.prune(density=density)
    dense = nnx.clone(model).densify()
    return model, dense


def test_a_step_with_an_optimizer():
    model, dense = twins()
    assert model.module.layers[0].kernel.get_value().shape == (307,)
    np.testing.assert_allclose(model(X), dense(X), rtol=1e-4, atol=1e-4)
    optimizers = [nnx.Optimizer(m, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for m in (model, dense)]

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(loss)(model, x)
        optimizer.update(model, grads)
        return value

    kept = [(layer.kernel.get_value() != 0).astype(jnp.float32) for layer in dense.layers]
    for _ in range(3):
        values = [step(m, optimizer, X) for m, optimizer in zip((model, dense), optimizers, strict=True)]
        np.testing.assert_allclose(*values, rtol=1e-3)
        for layer, mask in zip(dense.layers, kept, strict=True):
            layer.kernel.set_value(layer.kernel.get_value() * mask)
    np.testing.assert_allclose(model.module.norm.mean.get_value(), dense.norm.mean.get_value(), rtol=1e-3, atol=1e-5)
    back = nnx.clone(model).densify()
    for ours, theirs in zip(back.layers, dense.layers, strict=True):
        np.testing.assert_allclose(ours.kernel.get_value(), theirs.kernel.get_value(), rtol=1e-3, atol=1e-4)
    assert len(nnx.to_flat_state(nnx.state(model, msbp.Sparsity))) == 2
    assert [row.products for row in model.report(X).weights] == [1, 1]


def test_with_a_sparse_gradient():
    plan = {"layers/*/kernel": msbp.memorized(msbp.top_k(k=6, rows_per_group=4), decay=0.5)}
    model = msbp.sparse_weights(msbp.sparse_vjp(MLP(nnx.Rngs(0)), plan, min_features=1))
    model.prune(density=0.2)
    assert model(X).shape == (20, 10)  # before there is a memory
    model.init_memory(X)
    before = jax.tree.map(jnp.copy, nnx.state(model, msbp.Memory))
    value, grads = msbp.nnx.value_and_grad(loss)(model, X)
    assert np.isfinite(value)
    assert {leaf.shape for leaf in jax.tree.leaves(grads) if leaf.ndim == 1} >= {(307,), (96,)}
    after = nnx.state(model, msbp.Memory)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    with pytest.raises(ValueError, match="has a memory already"):
        msbp.sparse_weights(_with_memory())


def _with_memory():
    model = msbp.sparse_vjp(MLP(nnx.Rngs(0)), msbp.memorized(msbp.top_k(k=3), decay=0.5), min_features=1)
    model.init_memory(X)
    return model


def test_closed_over_and_mapped():
    """A call that writes nothing touches no Variable."""
    model = msbp.sparse_weights(nnx.Linear(32, 40, rngs=nnx.Rngs(0)))
    model.prune(density=0.2)
    want = model(X)
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(X), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(model)(X), want, rtol=1e-5, atol=1e-5)
    assert jax.grad(lambda x: model(x).sum())(X).shape == X.shape


class Stack(nnx.Module):
    """Three layers of one shape, their parameters stacked, that a scan runs through."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return nnx.Linear(32, 32, rngs=rngs)

        self.blocks = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return jnp.tanh(block(x))

        return run(x, self.blocks)


class Tied(nnx.Module):
    """One layer, at two places of the tree."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(32, 32, rngs=rngs)
        self.again = self.inner

    def __call__(self, x):
        return self.again(jnp.tanh(self.inner(x)))


@pytest.mark.parametrize("kind", [Stack, Tied])
def test_layers_that_are_stacked_or_shared(kind):
    model = msbp.sparse_weights(kind(nnx.Rngs(0)))
    model.prune(density=0.2, **({"stacked": ["blocks/*"]} if kind is Stack else {}))
    dense = nnx.clone(model).densify()
    np.testing.assert_allclose(model(X), dense(X), rtol=1e-3, atol=1e-4)
    grads, want = nnx.grad(loss)(model, X), nnx.grad(loss)(dense, X)
    assert len(nnx.to_flat_state(nnx.state(model, msbp.Sparsity))) == 1
    (values,) = [leaf for path, leaf in nnx.to_flat_state(grads) if path[-1] == "kernel"]
    (whole,) = [leaf for path, leaf in nnx.to_flat_state(want) if path[-1] == "kernel"]
    pattern = next(iter(model.sparsity.values())).get_value()
    np.testing.assert_allclose(values.get_value(), gathered(pattern, whole.get_value()), rtol=1e-3, atol=1e-4)
    assert model.report(X).weights[0].products == (1 if kind is Stack else 2)


def test_orbax_keeps_values_and_patterns(tmp_path):
    model, _ = twins()
    want, state = model(X), nnx.state(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at", state)
        checkpointer.wait_until_finished()
        blank = msbp.sparse_weights(MLP(nnx.Rngs(5)))
        blank.prune(density=0.2)
        assert not np.allclose(blank(X), want)
        read = checkpointer.restore(tmp_path / "at", jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(blank)))
    nnx.update(blank, read)
    np.testing.assert_array_equal(blank(X), want)


def test_what_is_refused():
    model, _ = twins()
    with pytest.raises(ValueError, match="are sparse already"):
        model.prune(density=0.1)
    with pytest.raises(TypeError, match="The order is the other one"):
        msbp.sparse_vjp(model, msbp.dithered(2))
    with pytest.raises(TypeError, match="one wrapping is enough"):
        msbp.sparse_weights(model)
