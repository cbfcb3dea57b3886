"""Whatever a call or a loss writes arrives as under plain NNX: wherever it stands, and whatever its type."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

N = 64
S = msbp.memorized(msbp.top_k(k=16, rows_per_group=2), decay=0.5)
X = jax.random.normal(jax.random.key(1), (8, 6))


class Base(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, N, rngs=rngs)
        self.head = nnx.Linear(N, N, rngs=rngs)


class RngsArgument(Base):
    """As Flax's own MNIST example has it."""

    def __call__(self, x, rngs):
        return self.head(nnx.Dropout(0.5)(self.layer(x), rngs=rngs))


class KeywordArgument(Base):
    def __call__(self, x, *, options):
        return self.head(nnx.Dropout(0.5)(self.layer(x), rngs=options["streams"][0]))


class OwnRngs(Base):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.layer(x)))


class EmaWeight(Base):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.ema = nnx.Param(jnp.zeros((6, N)))

    def __call__(self, x):
        self.ema[...] = 0.9 * self.ema[...] + 0.1 * jax.lax.stop_gradient(self.layer.kernel[...])
        return self.head(self.layer(x))


class Spectral(Base):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.SpectralNorm(self.layer, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x, update_stats=True))


class Weight(Base):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.WeightNorm(self.layer, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


class Statistics(Base):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(N, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.layer(x)))


class Counting(Base):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.calls = 0
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.seen = nnx.Variable(jnp.zeros((), bool))
        self.key = nnx.Variable(jax.random.key(7))

    def __call__(self, x):
        self.calls += 1
        self.count[...] += 1
        self.seen.set_value(jnp.ones((), bool))
        self.key.set_value(jax.random.split(self.key.get_value())[0])
        return self.head(self.layer(x))


class Growing(Base):
    """The structure changes: a Variable that was not there, a module that goes."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.gone = nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, x):
        y = self.layer(x)
        self.h = nnx.Intermediate(jax.lax.stop_gradient(y).mean())
        if hasattr(self, "gone"):
            del self.gone
            self.largest = nnx.Variable(jnp.abs(jax.lax.stop_gradient(y)).max())
        return self.head(y)


class OtherModule(Base):
    def __call__(self, x, other):
        other.count[...] += 1
        other.calls += 1
        return other(self.head(self.layer(x)))


class Scale(nnx.Module):
    def __init__(self):
        self.calls, self.count = 0, nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return x * 2


# What is called, and its further arguments.
CASES = {
    RngsArgument: lambda: ((nnx.Rngs(3),), {}),
    KeywordArgument: lambda: ((), {"options": {"streams": [nnx.Rngs(dropout=3)]}}),
    OwnRngs: lambda: ((), {}),
    EmaWeight: lambda: ((), {}),
    Spectral: lambda: ((), {}),
    Weight: lambda: ((), {}),
    Statistics: lambda: ((), {}),
    Counting: lambda: ((), {}),
    Growing: lambda: ((), {}),
    OtherModule: lambda: ((Scale(),), {}),
}


def eager(f):
    return f


case = pytest.mark.parametrize("net", CASES, ids=lambda net: net.__name__)


def pair(net):
    """Return a plain module and a wrapped one of the same numbers, each with arguments of its own."""
    model = msbp.sparse_vjp(net(nnx.Rngs(0)), S)
    args, kwargs = CASES[net]()
    memory = model.init_memory(X, *args, **kwargs)
    assert memory
    assert_same_writes((model.module, args, kwargs), (net(nnx.Rngs(0)), *CASES[net]()))  # init_memory writes nothing
    return (net(nnx.Rngs(0)), *CASES[net]()), (model, args, kwargs)


def written(objects):
    """Return the graph of some objects, with every plain attribute in it, and their Variables."""
    leaves = jax.tree.leaves(objects, is_leaf=lambda leaf: isinstance(leaf, nnx.Pytree))
    nodes = [leaf for leaf in leaves if isinstance(leaf, nnx.Pytree)]
    graphdef, state = nnx.split(nodes)
    bits = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    return graphdef, {path: np.asarray(bits(leaf[...])) for path, leaf in nnx.to_flat_state(state)}


def assert_same_writes(one, other, exactly=True):
    (structure, values), (others_structure, others_values) = written(one), written(other)
    assert structure == others_structure
    (assert_trees_equal if exactly else assert_trees_close)(values, others_values)


def square(model, x, args=(), kwargs=None):
    return (model(x, *args, **(kwargs or {})) ** 2).mean()


# A step is a call too, and has both: the call alone has them by turns.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "around"),
    [pytest.param(net, (eager, nnx.jit)[i % 2], id=net.__name__) for i, net in enumerate(CASES)],
)
def test_what_a_call_writes(net, around):
    (plain, args, kwargs), (model, own_args, own_kwargs) = pair(net)
    call = lambda model, *args, **kwargs: model(X, *args, **kwargs)
    for _ in range(2):
        assert_trees_close(around(call)(model, *own_args, **own_kwargs), around(call)(plain, *args, **kwargs))
        assert_same_writes((model.module, own_args, own_kwargs), (plain, args, kwargs), exactly=False)


@pytest.mark.slow
@case
@pytest.mark.parametrize("around", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_what_a_step_writes(net, around):
    (plain, args, kwargs), (model, own_args, own_kwargs) = pair(net)
    sparse = around(lambda *args, **kwargs: msbp.nnx.value_and_grad(square)(*args, **kwargs))
    dense = around(lambda *args, **kwargs: nnx.value_and_grad(square)(*args, **kwargs))
    before = jax.tree.map(np.asarray, nnx.state(model, msbp.Memory))
    for _ in range(2):
        assert_trees_close(sparse(model, X, own_args, own_kwargs)[0], dense(plain, X, args, kwargs)[0])
        assert_same_writes((model.module, own_args, own_kwargs), (plain, args, kwargs), exactly=False)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, nnx.state(model, msbp.Memory))
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "net",
    [RngsArgument, KeywordArgument, OwnRngs, EmaWeight, Spectral, Statistics, OtherModule],
    ids=lambda n: n.__name__,
)
def test_what_a_step_of_microbatches_writes(net):
    (plain, args, kwargs), (model, own_args, own_kwargs) = pair(net)
    if net is OtherModule:  # a count that is no Variable is part of the program: microbatches are one, run twice
        own_args[0].calls = args[0].calls = 0
    msbp.nnx.value_and_grad(square, microbatches=2)(model, X, own_args, own_kwargs)
    for half in (X[:4], X[4:]):
        nnx.value_and_grad(square)(plain, half, args, kwargs)
    if net is OtherModule:
        assert args[0].calls == 2
        args[0].calls = own_args[0].calls
    assert_same_writes((model.module, own_args, own_kwargs), (plain, args, kwargs), exactly=False)


def test_dropout_draws_anew_at_every_step():
    _, (model, args, _) = pair(RngsArgument)
    step = nnx.jit(lambda model, rngs: msbp.nnx.value_and_grad(square)(model, X, (rngs,))[0])
    losses = [float(step(model, *args)) for _ in range(3)]
    assert len(set(losses)) == 3
    assert args[0].default.count[...] == 3


class Beside(nnx.Module):
    """A wrapped model with a plain part beside it."""

    def __init__(self, wrap):
        self.body = wrap(nnx.Linear(6, N, rngs=nnx.Rngs(0)))
        self.ema = nnx.Param(jnp.zeros(()))
        self.norm = nnx.BatchNorm(N, rngs=nnx.Rngs(0))
        self.calls = 0

    def __call__(self, x):
        y = self.norm(self.body(x))
        self.ema[...] = self.ema[...] * 0.9 + jax.lax.stop_gradient(y.mean())
        self.calls += 1
        return y


def mutating(model, x):
    """A loss that writes to the model itself, from outside of any call."""
    y = model(x)
    model.ema[...] += 1
    model.last = nnx.Variable(jax.lax.stop_gradient(y).sum())
    model.norm.mean[...] *= 2
    model.calls = 10
    return (y**2).mean()


@pytest.mark.parametrize("loss", [square, mutating], ids=["call", "loss"])
@pytest.mark.parametrize("around", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_what_is_written_beside_a_wrapped_model(loss, around):
    model, plain = Beside(lambda m: msbp.sparse_vjp(m, S)), Beside(lambda m: m)
    model.body.init_memory(X)
    sparse = around(lambda *args: msbp.nnx.value_and_grad(loss)(*args))
    dense = around(lambda *args: nnx.value_and_grad(loss)(*args))
    for _ in range(2):
        assert_trees_close(sparse(model, X)[0], dense(plain, X)[0])
        assert model.calls == plain.calls
        assert_trees_close(model.ema[...], plain.ema[...])
        assert_trees_close(jax.tree.leaves(nnx.state(model.norm)), jax.tree.leaves(nnx.state(plain.norm)))
        assert hasattr(model, "last") == hasattr(plain, "last")


def test_a_loss_may_write_to_the_wrapped_module():
    def loss(model, x):
        model.module.bias[...] += 1.0
        return (model(x) ** 2).mean()

    model = msbp.sparse_vjp(nnx.Linear(6, N, rngs=nnx.Rngs(0)), S)
    model.init_memory(X)
    before = model.module.bias[...]
    msbp.nnx.value_and_grad(loss)(model, X)
    assert_trees_equal(model.module.bias[...], before + 1)


@pytest.mark.parametrize("gradient", [nnx.value_and_grad, msbp.nnx.value_and_grad], ids=["flax", "msbp"])
def test_what_nnx_refuses_is_refused(gradient):
    model = msbp.sparse_vjp(nnx.Linear(6, N, rngs=nnx.Rngs(0)), S)
    model.init_memory(X)
    target = model.module if gradient is nnx.value_and_grad else model
    outside = nnx.Variable(jnp.zeros(()))

    def loss(model, x):
        outside[...] = x.sum()
        return (model(x) ** 2).mean()

    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate"):
        gradient(loss)(target, X)
    if target is model:  # and after an error the model is as it was
        assert model.carriers is None
        loss, _ = msbp.nnx.value_and_grad(square)(model, X)
        assert_trees_close(loss, square(model.module, X))


def test_arguments_that_are_the_same_object_stay_so():
    class Shared(Base):
        def __call__(self, x, rngs):
            assert rngs is self.rngs
            return self.head(nnx.Dropout(0.5)(self.layer(x), rngs=rngs))

    module = Shared(nnx.Rngs(0))
    module.rngs = nnx.Rngs(3)
    model = msbp.sparse_vjp(module, S)
    model.init_memory(X, module.rngs)
    model(X, module.rngs)
    msbp.nnx.value_and_grad(lambda model, x: square(model, x, (model.module.rngs,)))(model, X)
    assert model.module is module
    assert module.rngs.default.count[...] == 2


def test_it_trains_like_plain_nnx_where_all_is_kept():
    """The whole step of Flax's MNIST example, with an optimizer, where the sparsifier keeps nearly everything."""
    make = lambda: RngsArgument(nnx.Rngs(0))
    plain, model = (
        make(),
        msbp.sparse_vjp(make(), {"head/*": msbp.dense(), "*": msbp.memorized(msbp.top_k(k=N - 1), 0.0)}),
    )
    own, rngs = nnx.Rngs(3), nnx.Rngs(3)
    model.init_memory(X, own)
    optimizers = [nnx.Optimizer(m, optax.sgd(1e-3), wrt=nnx.Param) for m in (model, plain)]
    losses = []
    for _ in range(3):
        pairs = [(msbp.nnx.value_and_grad, model, own), (nnx.value_and_grad, plain, rngs)]
        for optimizer, (gradient, m, r) in zip(optimizers, pairs, strict=True):
            loss, grads = gradient(square)(m, X, (r,))
            optimizer.update(m, grads)
            losses.append(float(loss))
    np.testing.assert_allclose(losses[::2], losses[1::2], rtol=1e-3)
    assert own.default.count[...] == rngs.default.count[...] == 3


def two_layers(wrap):
    first, second = (nnx.Linear(8 if seed == 0 else 64, 64, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    return wrap(first), wrap(second)


def of_pair(models, x):
    first, second = models.values() if isinstance(models, dict) else models
    return (second(first(x)) ** 2).mean()


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("container", [tuple, list, lambda pair: dict(zip("ab", pair, strict=True))])
def test_a_container_of_models_as_the_first_argument(container, count):
    x = jax.random.normal(jax.random.key(0), (4, 8))
    everything = msbp.Sparsifier(lambda aval: (), lambda u, s: (msbp.Dense(u), s), at=lambda where: everything)
    dense, sparse = (container(two_layers(lambda m, s=s: msbp.sparse_vjp(m, s))) for s in (everything, S))
    plain = container(two_layers(lambda m: m))
    for models in (dense, sparse):
        first, second = models.values() if isinstance(models, dict) else models
        part = x if count is None else x[:2]
        first.init_memory(part)
        second.init_memory(first.module(part))
    want_loss, want = nnx.value_and_grad(of_pair)(plain, x)
    loss, grads = msbp.nnx.value_and_grad(of_pair, microbatches=count)(dense, x)
    assert type(grads) is type(want)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
    msbp.nnx.value_and_grad(of_pair, microbatches=count)(sparse, x)
    for model in sparse.values() if isinstance(sparse, dict) else sparse:
        assert model.memory["kernel"].get_value().residual.any()


def test_the_model_by_keyword():
    model = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), S)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    model.init_memory(x)
    step = msbp.nnx.value_and_grad(lambda m, x: (m(x) ** 2).mean())
    loss, grads = step(m=model, x=x)
    assert model.memory["kernel"].get_value().residual.any()
    assert loss == (model.module(x) ** 2).mean()
    assert grads["module"]["kernel"][...].any()
    for wrong in ({}, {"x": x}):
        with pytest.raises(TypeError, match=r"The first argument of loss_fn, the model, is missing; got (x|nothing)"):
            step(**wrong)
    with pytest.raises(TypeError, match=r"must be an NNX model, or hold one, got tuple"):
        step((x, x), x)


def test_a_model_beside_the_first_argument_warns():
    """Its gradients are sparse, and its memory stands still."""
    first, second = two_layers(lambda m: msbp.sparse_vjp(m, S))
    x = jax.random.normal(jax.random.key(0), (4, 8))
    first.init_memory(x)
    second.init_memory(first(x))
    with pytest.warns(UserWarning, match=r"Linear is differentiated by something else than msbp\.nnx\.value_and_grad"):
        msbp.nnx.value_and_grad(lambda a, b, x: (b(a(x)) ** 2).mean())(first, second, x)
    assert first.memory["kernel"].get_value().residual.any()
    assert not second.memory["kernel"].get_value().residual.any()
    msbp.nnx.value_and_grad(lambda a, b, x: (b.module(a(x)) ** 2).mean())(first, second, x)  # dense, and no warning
