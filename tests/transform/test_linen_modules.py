"""What a Linen module has besides init and apply, a wrapped one has too; its arguments may have any names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

S = msbp.memorized(msbp.top_k(k=6), decay=0.8)
X = jax.random.normal(jax.random.key(0), (6, 8))


class Net(nn.Module):
    """An encoder and a decoder, as an autoencoder has them."""

    width: int = 64

    def setup(self):
        self.encoder = nn.Dense(self.width)
        self.decoder = nn.Dense(80)

    def encode(self, x):
        return nn.relu(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, x):
        return self.decode(self.encode(x))


def wrapped():
    model = msbp.sparse_vjp(Net(), S)
    variables = model.init(jax.random.key(1), X)
    return model, variables, model.init_memory(variables, X)


def test_bind():
    model, variables, _ = wrapped()
    bound = model.bind(variables)
    assert_trees_equal(bound(X), model.module.apply(variables, X))
    assert_trees_equal(bound.encode(X), model.module.apply(variables, X, method="encode"))
    with pytest.raises(ValueError, match=r"Net is bound to variables that are differentiated.*method="):
        jax.grad(lambda p: model.bind({"params": p})(X).mean())(variables["params"])


def test_clone():
    model, _, _ = wrapped()
    wide = model.clone(width=70)
    assert type(wide) is type(model)
    assert (wide.module.width, model.module.width) == (70, 64)
    variables = wide.init(jax.random.key(1), X)
    memory = wide.init_memory(variables, X)
    assert set(memory) == {"encoder/kernel", "decoder/kernel"}
    assert memory["encoder/kernel"].residual.shape == (70,)


def test_nn_apply():
    """`nn.apply(fn, module)` runs a function of the bound module: for evaluation, as `bind`."""
    model, variables, _ = wrapped()
    double = lambda module, x: 2.0 * module.decode(module.encode(x))
    assert_trees_equal(nn.apply(double, model)(variables, X), nn.apply(double, model.module)(variables, X))
    with pytest.raises(ValueError, match=r"Net is bound to variables that are differentiated"):
        jax.grad(lambda p: nn.apply(double, model)({"params": p}, X).mean())(variables["params"])
    assert_trees_equal(nn.init(double, model)(jax.random.key(1), X), variables)


@pytest.mark.parametrize("method", ["encode", Net.encode, lambda module, x: module.encode(x)])
def test_methods_reach_part_of_the_memory(method):
    model, variables, memory = wrapped()
    loss = lambda p, m, x: (model.apply({"params": p}, x, memory=m, method=method) ** 2).mean()
    _, grads, after = msbp.value_and_grad(loss)(variables["params"], memory, X)
    assert grads["encoder"]["kernel"].any()
    assert not grads["decoder"]["kernel"].any()
    assert after["encoder/kernel"].residual.any()
    assert_trees_equal(after["decoder/kernel"], memory["decoder/kernel"])


def test_init_with_output_lazy_init_and_tabulate():
    model, variables, _ = wrapped()
    y, same = model.init_with_output(jax.random.key(1), X)
    assert_trees_equal(same, variables)
    assert_trees_equal(y, model.module.apply(variables, X))
    assert_trees_equal(model.lazy_init(jax.random.key(1), jax.ShapeDtypeStruct(X.shape, X.dtype)), variables)
    assert "encoder" in model.tabulate(jax.random.key(1), X)


class Recalls(nn.Module):
    """A model with an argument of its own that is called memory, as a decoder's keys and values often are."""

    @nn.compact
    def __call__(self, x, memory=None):
        y = nn.Dense(64)(x)
        return y if memory is None else y + nn.Dense(64)(memory)


def recalls(p, x, memory):
    return x @ p["a"] + memory @ p["b"]


def test_an_argument_called_memory():
    for target in (Recalls(), recalls):
        with pytest.raises(ValueError, match=r"has an argument memory itself.*memory_name=\"backward_memory\""):
            msbp.sparse_vjp(target, S)
    with pytest.raises(ValueError, match=r"memory_name must be the name of a keyword argument, got 'not a name'"):
        msbp.sparse_vjp(recalls, S, memory_name="not a name")
    with pytest.raises(ValueError, match=r"has an argument x itself"):
        msbp.sparse_vjp(recalls, S, memory_name="x")

    model = msbp.sparse_vjp(Recalls(), S, memory_name="carried")
    variables = model.init(jax.random.key(0), X, X)
    memory = model.init_memory(variables, X, memory=X * 2)
    assert set(memory) == {"Dense_0/kernel", "Dense_1/kernel"}
    loss = lambda p, m, x: (model.apply({"params": p}, x, memory=x * 2, carried=m) ** 2).mean()
    value, _, after = msbp.value_and_grad(loss)(variables["params"], memory, X)
    assert value == (model.module.apply(variables, X, X * 2) ** 2).mean()
    assert after["Dense_1/kernel"].residual.any()
    with pytest.raises(ValueError, match=r"without its memory.*Pass carried=\.\.\."):
        jax.grad(lambda p: model.apply({"params": p}, X).mean())(variables["params"])

    f = msbp.sparse_vjp(recalls, S, memory_name="carried")
    params = {"a": jnp.ones((8, 64)), "b": jnp.ones((8, 64))}
    carried = f.init_memory(params, X, memory=X)
    assert_trees_equal(f(params, X, memory=X, carried=carried), recalls(params, X, X))


class Normed(nn.Module):
    """A layer whose statistics are taken over all devices, as Flax's ImageNet example has it."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(64)(x))
        return nn.Dense(64)(x)


@pytest.mark.parametrize("train", [False, True])
def test_init_memory_needs_no_axis_bound(train):
    model = msbp.sparse_vjp(Normed(), S)
    variables = model.init(jax.random.key(0), X, train=False)
    options = {"train": train, "mutable": ["batch_stats"]}
    memory = model.init_memory(variables, X, **options)
    assert set(memory) == {"Dense_0/kernel", "Dense_1/kernel"}
    assert "Dense_1" in str(model.report(variables, X, **options))


def test_batch_statistics_over_members_of_a_vmap_and_devices():
    """Where the axis is bound, the statistics are those of all: by pmap and by vmap alike."""
    model = msbp.sparse_vjp(Normed(), S)
    variables = model.init(jax.random.key(0), X, train=False)
    memory = model.init_memory(variables, X, train=True, mutable=["batch_stats"])
    xs = jax.random.normal(jax.random.key(3), (8, 6, 8))

    def step(params, memory, x):
        def loss(params, memory, x):
            y, changed = model.apply(
                {**variables, "params": params}, x, train=True, memory=memory, mutable=["batch_stats"]
            )
            return (y**2).mean(), changed

        (_, changed), grads, memory = msbp.value_and_grad(loss, has_aux=True)(params, memory, x)
        return changed, *jax.lax.pmean((grads, memory), "batch")

    by_vmap = jax.vmap(step, in_axes=(None, None, 0), axis_name="batch")(variables["params"], memory, xs)
    by_pmap = jax.pmap(step, in_axes=(None, None, 0), axis_name="batch")(variables["params"], memory, xs)
    assert_trees_close(by_vmap, by_pmap, floor=1e-2)  # a bias before a norm has no gradient
    mean = by_pmap[0]["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_array_equal(mean[0], mean[-1])
