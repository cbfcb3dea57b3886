"""What people do by mistake, coming from plain Flax, and what they are told."""

import flax.linen as nn
import flax.nnx as nnx
import flax.training.train_state
import jax
import jax.numpy as jnp
import optax
import pytest
from twins import assert_trees_equal

import msbp_jax as msbp

S = msbp.memorized(msbp.top_k(k=4), decay=0.5)
W, X = jnp.ones((8, 64)), jax.random.normal(jax.random.key(0), (6, 8))


def function():
    return msbp.sparse_vjp(lambda w, x: x @ w, S)


def linen():
    module = nn.Dense(64)
    return msbp.sparse_vjp(module, S), module.init(jax.random.key(0), X)


def linear():
    return nnx.Linear(8, 64, rngs=nnx.Rngs(0))


def nnx_model(memory=True):
    model = msbp.sparse_vjp(linear(), S)
    if memory:
        model.init_memory(X)
    return model


def linen_loss(model):
    return lambda params, memory, x: model.apply({"params": params}, x, memory=memory).mean()


def test_a_linen_model_used_as_an_nnx_one():
    model, _ = linen()
    with pytest.raises(TypeError, match=r"Dense is a Linen module: call it as model\.apply\(variables, .*memory=memor"):
        model(X)
    with pytest.raises(ValueError, match=r'variables with parameters in the collection "params".*got ArrayImpl'):
        model.init_memory(X)
    with pytest.raises(
        TypeError, match=r"must be an NNX model, or hold one, got SparseModule\. .*msbp\.value_and_grad"
    ):
        msbp.nnx.value_and_grad(lambda model, x: model(x).mean())(model, X)


@pytest.mark.parametrize("name", ["init", "apply"])
def test_an_nnx_model_used_as_a_linen_one(name):
    model, (_, variables) = nnx_model(), linen()
    with pytest.raises(AttributeError, match=rf"Linear is an NNX module and has no {name}: call it as model\(\*args\)"):
        getattr(model, name)(variables, X)
    for method in (model.init_memory, model.report):
        with pytest.raises(
            TypeError, match=r"Linear is an NNX module, which holds its variables: .*init_memory\(\*arg"
        ):
            method(variables, X)
    with pytest.raises(
        TypeError, match=r"takes parameters and memory apart, got an NNX model: use msbp\.nnx\.value_an"
    ):
        msbp.value_and_grad(lambda model, memory, x: model(x).mean())(model, {}, X)
    with pytest.raises(AttributeError, match=r"'SparseNNXModule' object has no attribute 'kernel'; .* its \.module"):
        _ = model.kernel


def test_the_error_of_the_model_itself_is_kept():
    class Reads(nnx.Module):
        def __call__(self, batch):
            return batch["params"]

    with pytest.raises(TypeError, match="is an NNX module") as raised:
        msbp.sparse_vjp(Reads(), S).init_memory({"params": X})
    assert isinstance(raised.value.__cause__, ValueError)


def test_inside_a_linen_module():
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return msbp.sparse_vjp(nn.Dense(64), S).apply({}, x)

    class InSetup(nn.Module):
        def setup(self):
            self.head = msbp.sparse_vjp(nn.Dense(64), S)

        def __call__(self, x):
            return self.head(x)

    for module, part in ((Compact(), "Dense_0"), (InSetup(), "part")):
        with pytest.raises(
            ValueError, match=rf'called inside a Linen module, .*whole model.*\(model, \{{"{part}/\*": '
        ):
            module.init(jax.random.key(0), X)


def test_params_and_memory_swapped():
    model, variables = linen()
    params, memory = variables["params"], model.init_memory(variables, X)
    swapped = r"The parameters hold states of sparsifiers.*Were params and memory swapped\?"
    with pytest.raises(TypeError, match=swapped):
        msbp.value_and_grad(linen_loss(model))(memory, params, X)
    with pytest.raises(TypeError, match=swapped):
        model.apply({"params": memory}, X, memory=params)
    with pytest.raises(ValueError, match=r"memory of kernel is an array, .*Were params and memory swapped\?"):
        model.apply(variables, X, memory=params)
    random = msbp.random_k(k=4), msbp.sample_rows(density=0.5), msbp.dithered(2), msbp.dithered(2, bits=8)
    draws = [msbp.sparse_vjp(lambda w, x: x @ w, sparsifier) for sparsifier in random]
    for g in (function(), *draws):
        with pytest.raises(TypeError, match=swapped):
            msbp.value_and_grad(lambda w, m, x, g=g: g(w, x, memory=m).mean())(g.init_memory(W, X), W, X)


def test_a_train_state_of_flax():
    model, variables = linen()
    step = msbp.train_step(linen_loss(model))
    options = {"apply_fn": model.apply, "params": variables["params"], "tx": optax.sgd(0.1)}
    with pytest.raises(TypeError, match=r"takes a msbp\.TrainState, .* got flax\.training\.train_state\.TrainState"):
        step(flax.training.train_state.TrainState.create(**options), X)
    with pytest.raises(TypeError, match=r"takes a msbp\.TrainState, .* got builtins\.dict"):
        step({"params": variables}, X)
    with pytest.raises(ValueError, match=r"Dense is differentiated without its memory"):
        step(msbp.TrainState.create(**options), X)


@pytest.mark.parametrize("module", [nn.Dense, nnx.Linear])
def test_a_class_in_place_of_a_module(module):
    with pytest.raises(
        TypeError, match=rf"not its class, got the class {module.__name__}\. .*{module.__name__}\(\.\.\."
    ):
        msbp.sparse_vjp(module, S)


def test_wrapping_twice():
    for wrapped, kind, name in (
        (function(), "SparseFunction", "<lambda>"),
        (linen()[0], "SparseModule", "Dense"),
        (nnx_model(), "SparseNNXModule", "Linear"),
    ):
        with pytest.raises(
            TypeError, match=rf"was given a {kind}, which it made itself from {name}: one wrapping is en"
        ):
            msbp.sparse_vjp(wrapped, S)


def test_a_pattern_behind_one_that_matches_all_it_matches():
    f = lambda p, x: (x @ p["a"]) @ p["b"] + x @ p["c"]
    params = {"a": W, "b": jnp.ones((64, 64)), "c": W}
    for plan, dead in (
        ({"*": S, "b": msbp.dense()}, "b"),
        ({"[ab]": S, "c": S, "?": msbp.dense()}, "?"),
        ({"a": S, "a*": S}, r"a\*"),
    ):
        with pytest.raises(
            ValueError, match=rf"The pattern '{'[?]' if dead == '?' else dead}' of the plan can never app"
        ):
            msbp.sparse_vjp(f, plan).init_memory(params, X)
    assert set(msbp.sparse_vjp(f, {"b": msbp.dense(), "*": S}).init_memory(params, X)) == {"a", "c"}
    assert set(msbp.sparse_vjp(f, {"a": S, "[ab]": S}).init_memory(params, X)) == {"a", "b"}


def test_a_plan_under_which_nothing_is_sparse():
    with pytest.warns(
        UserWarning, match=r"Nothing is sparse under this plan\. params: 64 features, fewer than min_feat"
    ):
        assert msbp.sparse_vjp(lambda w, x: x @ w, S, min_features=100).init_memory(W, X) == {}
    model = msbp.sparse_vjp(linear(), S, min_features=100)
    with pytest.warns(UserWarning, match=r"Nothing is sparse under this plan"):
        model.init_memory(X)
    # Where the plan says so itself, there is nothing to warn of.
    assert msbp.sparse_vjp(lambda w, x: x @ w, msbp.dense()).init_memory(W, X) == {}
    assert msbp.sparse_vjp(lambda w, x: x @ w, msbp.top_k(k=64)).init_memory(W, X) == {}


def test_plain_grad_of_an_nnx_model():
    model = nnx_model()
    with pytest.warns(
        UserWarning, match=r"Linear is differentiated by something else than msbp\.nnx\.value_and_grad: .*"
    ):
        grads = nnx.grad(lambda model: (model(X) ** 2).mean())(model)
    assert (grads["module"]["kernel"][...] == 0).any()  # sparse, as the warning says
    assert not model.memory["kernel"].get_value().residual.any()
    with pytest.raises(ValueError, match=r"holds no model with a memory, .*Wrap the model with msbp\.sparse_vjp"):
        msbp.nnx.value_and_grad(lambda model: model(X).mean())(nnx_model(memory=False))
    with pytest.raises(ValueError, match=r"No Variable of the first argument is of the kind wrt=.*LoRAParam"):
        msbp.nnx.value_and_grad(lambda model: model(X).mean(), wrt=nnx.LoRAParam)(nnx_model())


def test_an_optimizer_of_the_plain_model_goes_on():
    """It knows the plain model's paths, so it is given the plain model and its part of the gradients."""
    plain, twin = linear(), linear()
    optimizer, other = (nnx.Optimizer(m, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for m in (plain, twin))
    for model, mine in ((plain, optimizer), (twin, other)):
        mine.update(model, nnx.grad(lambda model: (model(X) ** 2).mean())(model))
    model = msbp.sparse_vjp(plain, S)
    model.init_memory(X)
    grads = msbp.nnx.value_and_grad(lambda model: (model(X) ** 2).mean())(model)[1]
    with pytest.raises(ValueError, match=r"\['module'\]"):
        optimizer.update(model, grads)
    optimizer.update(model.module, grads["module"])
    other.update(twin, grads["module"])
    for name in ("kernel", "bias"):
        assert_trees_equal(getattr(plain, name)[...], getattr(twin, name)[...])


def test_an_empty_batch():
    """It has no gradient and moves no memory; where a mean over it is taken, that is the loss's own NaN."""
    f = function()
    memory = f.init_memory(W, X[:0])
    assert_trees_equal(memory, f.init_memory(W, X))
    step = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).sum())
    _, _, warm = step(W, memory, X)
    for count in (None, 2):
        empty = msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).sum(), microbatches=count)
        loss, grads, after = empty(W, warm, X[:0])
        assert (loss, grads.any()) == (0, False)
        assert_trees_equal(after, warm)
    with pytest.raises(ValueError, match=r"microbatches=4 cuts each array .* shape \(6, 8\)\. Choose a number that di"):
        msbp.value_and_grad(lambda w, m, x: f(w, x, memory=m).sum(), microbatches=4)(W, memory, X)


@pytest.mark.parametrize("returned", [lambda loss: (loss, 3), lambda loss: {"loss": loss}, lambda loss: [loss], None])
def test_a_loss_that_is_no_number(returned):
    f, (model, variables), of_nnx = function(), linen(), nnx_model()
    memory = f.init_memory(W, X)
    give = returned or (lambda loss: None)
    of_function = lambda w, m, x: give(f(w, x, memory=m).mean())
    of_linen = lambda p, m, x: give(linen_loss(model)(p, m, x))
    state = msbp.TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(0.1),
        memory=model.init_memory(variables, X),
    )
    calls = [
        lambda: msbp.value_and_grad(of_function)(W, memory, X),
        lambda: msbp.value_and_grad(of_function, microbatches=2)(W, memory, X),
        lambda: jax.jit(msbp.value_and_grad(of_function))(W, memory, X),
        lambda: msbp.diagnose(of_function)(W, memory, X),
        lambda: msbp.DynamicScale().value_and_grad(of_function)(W, memory, X),
        lambda: msbp.train_step(of_linen)(state, X),
        lambda: msbp.nnx.value_and_grad(lambda model: give(model(X).mean()))(of_nnx),
        lambda: msbp.nnx.diagnose(lambda model: give(model(X).mean()))(of_nnx),
    ]
    for call in calls:
        with pytest.raises(
            TypeError, match=r"The loss must be a real scalar, got (tuple|dict|list|NoneType)\..*has_aux"
        ):
            call()
    with pytest.raises(TypeError, match=r"With has_aux=True the loss function must return \(loss, aux\), got"):
        msbp.DynamicScale().value_and_grad(lambda w, m, x: f(w, x, memory=m).mean(), has_aux=True)(W, memory, X)
    with pytest.raises(TypeError, match=r"With has_aux=True the loss function must return \(loss, aux\), got"):
        msbp.nnx.value_and_grad(lambda model: model(X).mean(), has_aux=True)(of_nnx)
