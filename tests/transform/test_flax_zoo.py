"""Everything with a parameter that Flax has, Linen and NNX: gradients of a masked twin, memory, no recompiling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from twins import assert_trees_close, assert_trees_equal, masked_contractions

import msbp_jax as msbp

pytestmark = pytest.mark.slow

K, GROUP, DECAY = 5, 3, 0.8
SPARSE = msbp.memorized(msbp.top_k(k=K, rows_per_group=GROUP), decay=DECAY)
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 4, 6))  # batch, time, features
IMAGES = jax.random.normal(KEY, (2, 5, 5, 3))
# With a carry of zeros a gate's gradient is exactly 0 in the first step, and its rows take no part in the memory.
ONES = nn.initializers.ones
TOKENS = jnp.arange(12).reshape(3, 4) % 11


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(6)(x)), None


def linen_stack(lifted):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(x)

    return Stack()


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6)
        return embed.attend(nn.Dense(6)(embed(tokens)))


def linen_scan(x):
    layers = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return layers(name="layers")(x, None)[0]


def linen_vmap(x):
    vmapped = nn.vmap(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
    return vmapped(name="ensemble")(jnp.stack([x, x]), jnp.zeros(2))[0]


# Each: a module, an input, and how many time steps share its weights.
LINEN = {
    "Dense": (nn.Dense(7), X, 1),
    "DenseGeneral": (nn.DenseGeneral((2, 4), axis=(-2, -1)), X, 1),
    "Einsum": (nn.Einsum((6, 2, 4), "btd,dhk->bthk"), X, 1),
    "Embed.attend, tied": (LinenTied(), TOKENS, 1),
    "MultiHeadDotProductAttention": (nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), X, 1),
    "RNN(LSTMCell)": (nn.RNN(nn.LSTMCell(7, carry_init=ONES)), X, 4),
    "RNN(OptimizedLSTMCell)": (nn.RNN(nn.OptimizedLSTMCell(7, carry_init=ONES)), X, 4),
    "RNN(GRUCell)": (nn.RNN(nn.GRUCell(7, carry_init=ONES)), X, 4),
    "Bidirectional": (nn.Bidirectional(nn.RNN(nn.SimpleCell(7)), nn.RNN(nn.SimpleCell(7))), X, 4),
    "Conv": (nn.Conv(8, (3, 3), strides=2), IMAGES, 1),
    "ConvTranspose": (nn.ConvTranspose(8, (2, 2), strides=(2, 2)), IMAGES, 1),
    "scan of remat": (linen_stack(linen_scan), X, 1),
    "vmap": (linen_stack(linen_vmap), X, 1),
}


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(6, 6, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.dense = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.dense(self.embed(tokens)))


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


class NnxRecurrent(nnx.Module):
    def __init__(self, cell):
        self.rnn = nnx.RNN(cell)

    def __call__(self, x):
        ones = jax.tree.map(jnp.ones_like, self.rnn.cell.initialize_carry((len(x), 6), nnx.Rngs(0)))
        return self.rnn(x, initial_carry=ones)


NNX = {
    "Linear": (lambda r: nnx.Linear(6, 7, rngs=r), X, 1),
    "LinearGeneral": (lambda r: nnx.LinearGeneral((4, 6), (2, 4), axis=(-2, -1), rngs=r), X, 1),
    "Einsum": (lambda r: nnx.Einsum("btd,dhk->bthk", (6, 2, 4), rngs=r), X, 1),
    "Embed.attend, tied": (NnxTied, TOKENS, 1),
    "MultiHeadAttention": (NnxAttention, X, 1),
    "RNN(LSTMCell)": (lambda r: NnxRecurrent(nnx.LSTMCell(6, 7, rngs=r)), X, 4),
    "RNN(GRUCell)": (lambda r: NnxRecurrent(nnx.GRUCell(6, 7, rngs=r)), X, 4),
    "LoRALinear": (lambda r: nnx.LoRALinear(6, 8, lora_rank=6, rngs=r), X, 1),
    "Conv": (lambda r: nnx.Conv(3, 8, (3, 3), strides=2, rngs=r), IMAGES, 1),
    "ConvTranspose": (lambda r: nnx.ConvTranspose(3, 8, (2, 2), strides=(2, 2), rngs=r), IMAGES, 1),
    "scan of remat": (NnxStack, X, 1),
}


def shapes_of(report):
    """Return the shape of each site's weight: the right operand, if it has as many entries as the weight."""
    found = {}
    for row in report.sparse:
        lhs, rhs = (tuple(map(int, side.split("x"))) for side in row.contraction.split(" . "))
        found[row.name] = rhs if np.prod(rhs) == row.m * row.n else lhs
    return found


def check(report, apply, params, memory, step, steps):
    """Compare two steps of `step` with a twin's gradients and residuals; `apply(params)` is the plain model."""
    assert report.sparse
    shapes = shapes_of(report)
    zeros = {shapes[row.name]: (np.zeros(row.n, np.float32), np.zeros(row.n, np.float32)) for row in report.sparse}

    def twin(params, probes):
        with masked_contractions(K, GROUP, probes) as replaced:
            return (jnp.sin(apply(params, replaced))).mean()

    grads, probes = jax.jit(jax.grad(twin, argnums=(0, 1)))(params, zeros)
    got, after = step(params, memory)
    assert_trees_close(got, grads, rtol=1e-4, floor=1e-3)
    for shape in zeros:
        rows = [row for row in report.sparse if shapes[row.name] == shape]
        # Sums over sites and instances of the same shape; rows times time steps make the mean.
        total = sum(np.asarray(after[row.name].residual).reshape(-1, row.n).sum(0) * row.rows for row in rows) * steps
        above, below = probes[shape]
        np.testing.assert_allclose(total, DECAY * (above - below), rtol=1e-3, atol=2e-6)
    assert any(np.abs(state.residual).sum() > 0 for state in after.values())


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    module, x, steps = LINEN[name]
    model = msbp.sparse_vjp(module, SPARSE, min_features=1)
    params = jax.jit(model.init)(KEY, x)
    memory = model.init_memory(params, x)
    traces = []

    @jax.jit
    def step(params, memory):
        traces.append(1)
        loss = lambda p, m: jnp.sin(model.apply(p, x, memory=m)).mean()
        _, grads, memory = msbp.value_and_grad(loss)(params, memory)
        return grads, memory

    if name == "vmap":  # the twin does not see the batch axis that vmap adds: compare with the instances themselves
        grads, after = step(params, memory)
        kernel = params["params"]["ensemble"]["Dense_0"]
        for i in range(2):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], kernel)
            one = msbp.sparse_vjp(nn.Dense(6), SPARSE, min_features=1)
            loss = lambda p, m, one=one: jnp.sin(nn.tanh(one.apply({"params": p}, x, memory=m))).mean() / 2
            _, want, new = jax.jit(msbp.value_and_grad(loss))(own, one.init_memory({"params": own}, x))
            got = jax.tree.map(lambda leaf, i=i: leaf[i], grads["params"]["ensemble"]["Dense_0"])
            assert_trees_close(got, want)
            assert_trees_close(after["ensemble/Dense_0/kernel"].residual[i], new["kernel"].residual)
    else:
        check(model.report(params, x), lambda p, _: module.apply(p, x), params, memory, step, steps)
    _, memory = step(params, memory)
    step(params, memory)
    assert len(traces) == 1
    full = msbp.sparse_vjp(module, msbp.top_k(k=1000), min_features=1)
    sparse, plain = (
        jax.jit(jax.grad(lambda p, f=f, options=options: jnp.sin(f.apply(p, x, **options)).mean()))(params)
        for f, options in ((full, {"memory": {}}), (module, {}))
    )
    assert_trees_equal(sparse, plain)


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, x, steps = NNX[name]
    with jax.numpy_rank_promotion("allow"):
        model = msbp.sparse_vjp(make(nnx.Rngs(0)), SPARSE, min_features=1)
        model.init_memory(x)
        report = model.report(x)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        traces = []

        @nnx.jit
        def train(model):
            traces.append(1)
            _, grads = msbp.nnx.value_and_grad(lambda model: jnp.sin(model(x)).mean())(model)
            return grads

        def step(params, memory):
            grads = train(model)
            return grads, {name: variable.get_value() for name, variable in model.memory.items()}

        def apply(params, replaced):
            own = nnx.merge(graphdef, params, rest, copy=True).module
            for _, part in nnx.iter_modules(own):  # the products that modules were given when they were made
                for attribute, function in replaced.items():
                    if getattr(part, attribute, None) is not None:
                        setattr(part, attribute, function)
            return own(x)

        plain = jax.jit(jax.grad(lambda p: jnp.sin(nnx.merge(graphdef, p, rest, copy=True).module(x)).mean()))
        dense = plain(params)
        check(report, apply, params, None, step, steps)
        train(model)
        train(model)
        assert len(traces) == 1
        full = msbp.sparse_vjp(make(nnx.Rngs(0)), msbp.top_k(k=1000), min_features=1)
        full.init_memory(x)
        _, grads = nnx.jit(lambda m: msbp.nnx.value_and_grad(lambda m: jnp.sin(m(x)).mean())(m))(full)
        assert_trees_equal(jax.tree.leaves(grads), jax.tree.leaves(dense))


def test_experts_of_a_batched_product_choose_each_for_itself():
    """Mixture of experts: rows are dispatched to experts, [experts, capacity, features], with a matrix each."""
    x = jax.random.normal(KEY, (3, 7, 6))
    w = jax.random.normal(jax.random.key(1), (3, 6, 8))
    f = msbp.sparse_vjp(lambda w, x: jnp.einsum("ecd,edf->ecf", x, w), SPARSE, min_features=1)
    memory = f.init_memory(w, x)
    assert memory["params"].residual.shape == (3, 8)
    loss = lambda w, m, x: jnp.sin(f(w, x, memory=m)).sum()
    _, grads, after = jax.jit(msbp.value_and_grad(loss))(w, memory, x)
    one = msbp.sparse_vjp(lambda w, x: x @ w, SPARSE, min_features=1)
    for i in range(3):
        own = lambda w, m, x: jnp.sin(one(w, x, memory=m)).sum()
        _, want, new = msbp.value_and_grad(own)(w[i], one.init_memory(w[i], x[i]), x[i])
        assert_trees_close(grads[i], want)
        assert_trees_close(after["params"].residual[i], new["params"].residual)
