"""Linen modules, wrapped: the same variables, the same outputs, the arguments that `apply` takes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

SPARSE = msbp.memorized(msbp.top_k(density=0.1, rows_per_group=4), decay=0.8)
KEY = jax.random.key(0)


class Net(nn.Module):
    """Dense layers, dropout and batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(96)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3, name="head")(x)

    def features(self, x):
        return self(x).sum()


X = jax.random.normal(KEY, (10, 6))


def test_variables_outputs_and_sites_are_the_plain_modules():
    model = msbp.sparse_vjp(Net(), SPARSE)
    variables = model.init(KEY, X)
    assert_trees_equal(variables, Net().init(KEY, X))
    memory = model.init_memory(variables, X)
    assert list(memory) == ["Dense_0/kernel"]
    assert_trees_equal(model.apply(variables, X), Net().apply(variables, X))
    assert_trees_equal(model.apply(variables, X, memory=memory), Net().apply(variables, X))
    assert_trees_equal(model.init_with_output(KEY, X), Net().init_with_output(KEY, X))
    assert "Dense_0" in model.tabulate(KEY, X)
    assert "top_k" in repr(model)
    lazy = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert_trees_equal(model.lazy_init(KEY, lazy), variables)


def test_apply_takes_rngs_mutable_method_and_captures():
    model = msbp.sparse_vjp(Net(), SPARSE)
    variables = model.init(KEY, X)
    kwargs = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats", "intermediates"]}
    memory = model.init_memory(variables, X, **kwargs)
    assert_trees_equal(model.apply(variables, X, memory=memory, **kwargs), Net().apply(variables, X, **kwargs))
    got = model.apply(variables, X, memory=memory, method="features")
    assert_trees_equal(got, Net().apply(variables, X, method="features"))
    got = model.apply(variables, X, memory=memory, capture_intermediates=True)
    assert_trees_equal(got, Net().apply(variables, X, capture_intermediates=True))


@pytest.mark.leaks
def test_training_step_with_dropout_and_batch_norm():
    model = msbp.sparse_vjp(Net(), SPARSE)
    variables = model.init(KEY, X)

    def loss_fn(apply, params, stats, **kwargs):
        y, updates = apply(
            {"params": params, "batch_stats": stats},
            X,
            train=True,
            rngs={"dropout": KEY},
            mutable=["batch_stats"],
            **kwargs,
        )
        return (y**2).mean(), updates

    memory = model.init_memory(variables, X, train=False)
    step = jax.jit(msbp.value_and_grad(lambda p, m, s: loss_fn(model.apply, p, s, memory=m), has_aux=True))
    (loss, updates), grads, memory = step(variables["params"], memory, variables["batch_stats"])
    plain = jax.jit(jax.value_and_grad(lambda p, s: loss_fn(Net().apply, p, s), has_aux=True))
    (plain_loss, plain_updates), dense = plain(variables["params"], variables["batch_stats"])
    assert_trees_close((loss, updates), (plain_loss, plain_updates))
    assert_trees_close(grads["head"], dense["head"])  # above the sparse site nothing changes
    assert_trees_close(grads["Dense_0"]["bias"], dense["Dense_0"]["bias"])  # biases are dense
    assert not np.allclose(grads["Dense_0"]["kernel"], dense["Dense_0"]["kernel"])
    assert np.abs(memory["Dense_0/kernel"].residual).sum() > 0


class Block(nn.Module):
    """A layer to be stacked by scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(64)(x)), None


class Zoo(nn.Module):
    """Contractions that Flax's own hooks do not reach."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(70, 64)
        x = embed(tokens)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=64)(x, x)
        x = nn.Einsum((64, 2, 32), "btd,dhk->bthk", use_bias=False)(x).reshape(x.shape)
        scan = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(x, None)
        x = nn.RNN(nn.GRUCell(64))(x)
        return embed.attend(x)


@pytest.mark.slow
def test_names_of_the_zoo():
    tokens = jnp.arange(8).reshape(2, 4)
    model = msbp.sparse_vjp(Zoo(), SPARSE)
    variables = model.init(KEY, tokens)
    shapes = {name: state.residual.shape for name, state in model.init_memory(variables, tokens).items()}
    attention = {f"MultiHeadDotProductAttention_0/{name}/kernel": (64,) for name in ("query", "key", "value", "out")}
    cell = {f"GRUCell_0/{name}/kernel": (64,) for name in ("in", "ir", "iz", "hn", "hr", "hz")}
    assert shapes == {
        **attention,
        **cell,
        "Einsum_0/kernel": (64,),
        "layers/Dense_0/kernel": (3, 64),
        "Embed_0/embedding": (70,),
    }
    left = {row.name: row.reason for row in model.report(variables, tokens).dense}
    assert set(left) == {"@dot_general_0", "@dot_general_1"}  # scores and values of attention
    assert all("no operand is a parameter alone" in reason for reason in left.values())
    loss = lambda p, m: (model.apply({"params": p}, tokens, memory=m) ** 2).mean()
    _, grads, memory = msbp.value_and_grad(loss)(variables["params"], model.init_memory(variables, tokens))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, variables["params"])
    assert all(np.abs(state.residual).sum() > 0 for state in memory.values())


def test_a_recurrent_cell_has_one_memory_and_any_sequence_length():
    """Steps count as rows: the memory is the mean of the steps' residuals."""
    model = msbp.sparse_vjp(nn.RNN(nn.SimpleCell(64)), msbp.memorized(msbp.top_k(k=5), decay=1.0))
    x = jax.random.normal(KEY, (2, 6, 8))
    variables = model.init(KEY, x)
    memory = model.init_memory(variables, x)
    loss = lambda p, m, x: (model.apply({"params": p}, x, memory=m) ** 2).sum()
    for length in (6, 4):
        _, _, memory = msbp.value_and_grad(loss)(variables["params"], memory, x[:, :length])
        assert memory["cell/h/kernel"].residual.shape == (64,)


@pytest.mark.parametrize("variables", [{}, {"batch_stats": {}}, {"params": {}}, 3])
def test_variables_without_parameters_raise(variables):
    with pytest.raises(ValueError, match=r'parameters in the collection "params".*got'):
        msbp.sparse_vjp(Net(), SPARSE).init_memory(variables, X)
