"""The gradient that enters a model, "@outputs": one draw there, whose rows every layer below leaves out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

ROWS, M, N = 24, 6, 64
SAMPLE = msbp.sample_rows(efficiency=0.8)
HALF = msbp.sample_rows(density=0.5)
SKIP = msbp.skip_zero_rows()
TOP = msbp.memorized(msbp.top_k(k=6, rows_per_group=2), decay=0.8)
X, TARGET = random_gradient(0, ROWS, M), random_gradient(1, ROWS, 3)
PARAMS = {
    "a": random_gradient(2, M, N) / 4,
    "bias": random_gradient(3, 1, N)[0],
    "scale": 1 + random_gradient(4, 1, N)[0] / 9,
    "b": random_gradient(5, N, N) / 8,
    "out": random_gradient(6, N, 3) / 8,
}
# Added at the hidden layers and at the output: their gradients are what arrives there, row by row.
PROBES = {"first": jnp.zeros((ROWS, N)), "second": jnp.zeros((ROWS, N)), "last": jnp.zeros((ROWS, 3))}


def mlp(p, x):
    """Linear layers with a bias and a layer norm."""
    probes = p.get("probes", PROBES)
    h = x @ p["a"] + p["bias"][None, :] + probes["first"]
    h = (h - h.mean(axis=1, keepdims=True)) / (h.std(axis=1, keepdims=True) + 1e-3) * p["scale"][None, :]
    return jnp.tanh(jnp.tanh(h) @ p["b"] + probes["second"]) @ p["out"] + probes["last"]


PROBED = PARAMS | {"probes": PROBES}


def loss_of(f, x=X):
    return lambda p, m: ((f(p, x, memory=m) - TARGET) ** 2).sum()


def dense_gradients(p=PARAMS):
    return jax.grad(lambda p: ((mlp(p, X) - TARGET) ** 2).sum())(p)


def gradients(f, p=PARAMS, memory=None):
    return msbp.value_and_grad(loss_of(f))(p, f.init_memory(p, X) if memory is None else memory)[1]


def with_key(memory, key):
    return memory | {"@outputs": memory["@outputs"]._replace(key=key)}


def many_gradients(f, p, draws, seed=0):
    """Return the gradients of many draws, each leaf with a leading axis of draws."""
    memory, keys = f.init_memory(p, X), jax.random.split(jax.random.key(seed), draws)
    return jax.jit(jax.vmap(lambda key: gradients(f, p, with_key(memory, key))))(keys)


def live(leaf):
    return np.asarray(leaf).any(axis=1)


def test_a_draw_for_a_whole_model_is_short_for_a_plan():
    short, written = msbp.sparse_vjp(mlp, SAMPLE), msbp.sparse_vjp(mlp, {"@outputs": SAMPLE, "*": SKIP})
    memory = short.init_memory(PARAMS, X)
    assert_trees_equal(memory, written.init_memory(PARAMS, X))
    assert {name for name, state in memory.items() if jax.tree.leaves(state)} == {"@outputs"}
    run = lambda f: jax.jit(msbp.value_and_grad(loss_of(f)))(PARAMS, memory)
    assert_trees_equal(run(short), run(written))
    assert repr(short) == repr(written)


def test_the_forward_is_untouched():
    f = msbp.sparse_vjp(mlp, SAMPLE)
    assert_trees_equal(f(PARAMS, X), mlp(PARAMS, X))
    assert_trees_equal(f(PARAMS, X, memory=f.init_memory(PARAMS, X)), mlp(PARAMS, X))


def test_there_is_one_draw():
    """The same rows are 0 at every layer, and the others weighed up by what they were at the output."""
    got, dense = gradients(msbp.sparse_vjp(mlp, HALF), PROBED)["probes"], dense_gradients(PROBED)["probes"]
    kept = live(got["last"])
    assert kept.sum() == ROWS // 2
    weight = np.asarray(got["last"])[:, :1] / np.asarray(dense["last"])[:, :1]
    assert (weight[kept] >= 1 - 1e-6).all()
    assert_trees_close(got, jax.tree.map(lambda leaf: leaf * weight, dense))


@pytest.mark.slow
def test_the_whole_gradient_is_unbiased():
    """Biases and layer norms as well, entry by entry."""
    draws = 4000
    found, dense = many_gradients(msbp.sparse_vjp(mlp, SAMPLE), PARAMS, draws), dense_gradients()
    for name, leaf in found.items():
        leaf, want = np.asarray(leaf, np.float64), np.asarray(dense[name], np.float64)
        error = np.abs(leaf.mean(axis=0) - want)
        allowed = 5.5 * leaf.std(axis=0) / draws**0.5 + 1e-5 * np.abs(want).max()
        assert leaf.std(axis=0).max() > 0, name
        assert (error <= allowed).all(), name


def test_the_variance_at_the_output_is_what_the_efficiency_predicts():
    found = many_gradients(msbp.sparse_vjp(mlp, SAMPLE), PROBED, 3000)["probes"]["last"]
    g = np.asarray(dense_gradients(PROBED)["probes"]["last"], np.float64)
    measured = ((np.asarray(found, np.float64) - g) ** 2).sum(axis=(1, 2)).mean()
    assert measured == pytest.approx((1 / 0.8 - 1) * (g**2).sum(), rel=0.1)


def test_efficiency_1_is_plain_jax():
    f = msbp.sparse_vjp(mlp, msbp.sample_rows(efficiency=1))
    got = jax.jit(lambda p, m: gradients(f, p, m))(PARAMS, f.init_memory(PARAMS, X))
    assert_trees_equal(got, jax.jit(dense_gradients)(PARAMS))


def test_columns_are_chosen_within_the_rows_that_are_left():
    f = msbp.sparse_vjp(mlp, {"@outputs": HALF, "out": SKIP, "*": TOP})
    memory = f.init_memory(PROBED, X)
    assert set(memory) == {"@outputs", "a", "b", "out"}
    for _ in range(2):
        _, grads, memory = msbp.value_and_grad(loss_of(f))(PROBED, memory)
        kept = live(grads["probes"]["last"])
        assert kept.sum() == ROWS // 2
        for probe in ("first", "second"):
            np.testing.assert_array_equal(live(grads["probes"][probe]), kept)
    assert np.asarray(memory["a"].residual).any()


def test_rows_that_are_left_out_take_no_part_in_a_memory():
    """It is that of the gradient as the draw left it; rows of the identity show in dw which columns were chosen."""
    f = msbp.sparse_vjp(lambda p, x: x @ p["a"] + p["probe"], {"@outputs": HALF, "*": TOP})
    params = {"a": random_gradient(7, ROWS, N), "probe": jnp.zeros((ROWS, N))}
    g, x = random_gradient(8, ROWS, N), jnp.eye(ROWS)
    loss = lambda p, m: (f(p, x, memory=m) * g).sum()
    _, grads, memory = msbp.value_and_grad(loss)(params, f.init_memory(params, x))
    left = grads["probe"]
    p, want = TOP.apply(left, TOP.init(jax.ShapeDtypeStruct(left.shape, left.dtype)))
    assert live(left).sum() == ROWS // 2
    assert_trees_close(grads["a"], p.materialize())
    assert_trees_close(memory["a"], want)


def test_with_a_dense_dx_only_dw_is_sampled():
    f = msbp.sparse_vjp(mlp, {"*": msbp.split(dx=msbp.dense(), dw=HALF)})
    got, dense = jax.jit(lambda p: gradients(f, p))(PROBED), jax.jit(dense_gradients)(PROBED)
    for name in ("probes", "bias", "scale"):
        assert_trees_equal(got[name], dense[name])
    for name in ("a", "b", "out"):
        assert not np.allclose(got[name], dense[name], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["norm", "product"])
def test_a_sampled_dw_is_unbiased(scores):
    dw = msbp.sample_rows(density=0.5, scores=scores)
    f = msbp.sparse_vjp(lambda w, x: jnp.tanh(x @ w), {"*": msbp.split(dx=msbp.dense(), dw=dw)})
    w, draws = PARAMS["a"], 4000
    memory = f.init_memory(w, X)
    (name,) = memory
    dense = np.asarray(jax.grad(lambda w: jnp.tanh(X @ w).sum())(w))

    def one(key):
        drawn = memory[name]._replace(dw=memory[name].dw._replace(key=key))
        return msbp.value_and_grad(lambda w, m: f(w, X, memory=m).sum())(w, {name: drawn})[1]

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)), np.float64)
    allowed = 5.5 * found.std(axis=0) / draws**0.5 + 1e-5 * np.abs(dense).max()
    assert (np.abs(found.mean(axis=0) - dense) <= allowed).all()


def test_at_each_site_a_draw_of_its_own():
    got = gradients(msbp.sparse_vjp(mlp, {"*": HALF}), PROBED)["probes"]
    assert live(got["last"]).all()
    assert live(got["second"]).sum() == ROWS // 2
    assert live(got["first"]).sum() < ROWS // 2 + 1


def test_groups_of_rows_are_entries_of_axis_0():
    """One row is all of an example: here 4 steps."""
    f = msbp.sparse_vjp(lambda p, x: jnp.tanh(x @ p["a"]) @ p["out"], msbp.sample_rows(count=3))
    x, probe = X.reshape(6, 4, M), random_gradient(9, ROWS, 3).reshape(6, 4, 3)
    assert f.init_memory(PARAMS, x)["@outputs"].kept.shape == ()
    loss = lambda p, m: ((f(p, x, memory=m) + p["probe"]) * probe).sum()
    grads = msbp.value_and_grad(loss)(PARAMS | {"probe": jnp.zeros_like(probe)}, f.init_memory(PARAMS, x))[1]
    assert np.asarray(grads["out"]).any()
    dx = jax.grad(lambda x: (f(PARAMS, x, memory=f.init_memory(PARAMS, x)) * probe).sum())(x)
    np.testing.assert_array_equal(np.sort(np.asarray(dx).any(axis=2).sum(axis=1)), [0, 0, 0, 4, 4, 4])


def test_several_outputs_share_one_draw_and_integers_pass():
    def network(p, x):
        h = jnp.tanh(x @ p["a"])
        return {"logits": h @ p["out"], "class": jnp.argmax(h, axis=1), "length": jnp.sum(h, axis=1)}

    f = msbp.sparse_vjp(network, HALF)
    want = network(PARAMS, X)
    weights = {"logits": TARGET, "length": random_gradient(7, 1, ROWS)[0]}
    memory = f.init_memory(PARAMS, X)
    assert_trees_equal(f(PARAMS, X, memory=memory), want)
    total = lambda y: sum((y[name] * weight).sum() for name, weight in weights.items())
    dx = jax.grad(lambda x: total(f(PARAMS, x, memory=memory)))(X)
    assert live(dx).sum() == ROWS // 2
    logits_alone = jax.grad(lambda x: (f(PARAMS, x, memory=memory)["logits"] * TARGET).sum())(X)
    assert live(logits_alone).sum() == ROWS // 2
    dense = jax.grad(lambda x: total(network(PARAMS, x)))(X)
    ratio = np.asarray(dx)[live(dx)] / np.asarray(dense)[live(dx)]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-3)


def test_outputs_of_two_dtypes():
    network = lambda p, x: (jnp.tanh(x @ p["a"]), (x @ p["a"]).astype(jnp.bfloat16))
    f = msbp.sparse_vjp(network, HALF)
    loss = lambda p, m: sum(y.astype(jnp.float32).sum() for y in f(p, X, memory=m))
    grads = msbp.value_and_grad(loss)(PARAMS, f.init_memory(PARAMS, X))[1]
    assert grads["a"].dtype == jnp.float32
    assert np.isfinite(np.asarray(grads["a"])).all()


@pytest.mark.parametrize(
    ("network", "plan", "message"),
    [
        (
            lambda p, x: ((x @ p["a"]) ** 2).mean(),
            SAMPLE,
            r"returns a scalar, such as a loss, .*Wrap the model without",
        ),
        (lambda p, x: (x @ p["a"], jnp.sum(x)), SAMPLE, r"returns a scalar, .*compute the loss outside, an auxiliary"),
        (
            lambda p, x: (x @ p["a"], p["b"]),
            SAMPLE,
            r"must all share it, got outputs of shapes \[\(24, 64\), \(64, 64\)",
        ),
        (lambda p, x: jnp.argmax(x @ p["a"], axis=1), SAMPLE, r"of the floating outputs .* got outputs of shapes \[\]"),
        (
            mlp,
            {"@outputs": msbp.sample_rows(density=0.5, scores="product"), "*": SKIP},
            "Outputs have no operands, and .* wants to see input_norms .*Use it under a pattern over sites",
        ),
        (mlp, msbp.sample_rows(count=25), r"count=25 is more than the 24 rows"),
    ],
)
def test_refused(network, plan, message):
    with pytest.raises(ValueError, match=message):
        msbp.sparse_vjp(network, plan).init_memory(PARAMS, X)


def test_outputs_alone_leave_the_sites_to_other_patterns():
    f = msbp.sparse_vjp(mlp, {"@outputs": HALF, "b": TOP})
    assert set(f.init_memory(PARAMS, X)) == {"@outputs", "b"}
    assert live(gradients(f, PROBED)["probes"]["first"]).sum() == ROWS // 2


@pytest.mark.parametrize("plan", [HALF, {"@outputs": HALF}], ids=str)
def test_differentiated_without_its_memory(plan):
    with pytest.raises(ValueError, match="is differentiated without its memory, which would be a dense backward"):
        jax.grad(lambda p: msbp.sparse_vjp(mlp, plan)(p, X).sum())(PARAMS)


def test_parameters_and_memory_swapped():
    f = msbp.sparse_vjp(mlp, HALF)
    with pytest.raises(TypeError, match=r"parameters hold states of sparsifiers.*Were params and memory swapped"):
        msbp.value_and_grad(loss_of(f))(f.init_memory(PARAMS, X), PARAMS)


def test_columns_of_the_gradient_that_enters():
    f = msbp.sparse_vjp(lambda p, x: x @ p["a"], {"@outputs": msbp.top_k(k=5), "*": SKIP})
    dx = jax.grad(lambda p: (f(p, jnp.eye(M)) * random_gradient(9, M, N)).sum())(PARAMS)["a"]
    np.testing.assert_array_equal(np.count_nonzero(dx, axis=1), 5)


class BatchNet(nn.Module):
    """Batch norm below the last layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(N)(x))
        return nn.Dense(3)(nn.relu(x))


def test_linen_with_batch_statistics():
    """Collections that a call changes are no outputs, though their axis 0 is another."""
    model = msbp.sparse_vjp(BatchNet(), HALF)
    variables = model.init(jax.random.key(0), X)
    memory = model.init_memory(variables, X, mutable=["batch_stats"])
    assert {name for name, state in memory.items() if jax.tree.leaves(state)} == {"@outputs"}

    def loss(params, memory):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        y, updates = model.apply(variables_, X, mutable=["batch_stats"], memory=memory)
        return ((y - TARGET) ** 2).sum(), updates

    (_, updates), grads, after = jax.jit(msbp.value_and_grad(loss, has_aux=True))(variables["params"], memory)
    assert_trees_close(updates, BatchNet().apply(variables, X, mutable=["batch_stats"])[1])
    assert float(after["@outputs"].kept) == ROWS // 2
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["Dense_1"]))


class Tokens(nnx.Module):
    """A network with dropout, whose streams of random numbers a call moves on."""

    def __init__(self, rngs):
        self.a, self.norm = nnx.Linear(M, N, rngs=rngs), nnx.LayerNorm(N, rngs=rngs)
        self.drop, self.b = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(N, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(self.drop(nnx.relu(self.norm(self.a(x)))))


def test_nnx():
    model = msbp.sparse_vjp(Tokens(nnx.Rngs(0)), HALF)
    model.init_memory(X)
    _, grads = msbp.nnx.value_and_grad(lambda model: ((model(X) - TARGET) ** 2).sum())(model)
    assert float(msbp.nnx.metrics(model)["@outputs/count"]) == ROWS // 2
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(nnx.to_pure_dict(grads)))


def test_stacked_layers_and_a_recurrent_network():
    def network(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], jnp.stack([p["b"], p["b"] / 2]))
        step = lambda h, _: (jnp.tanh(h @ p["b"]), None)
        return jax.checkpoint(lambda h: lax.scan(step, h, None, length=3)[0])(h) @ p["out"]

    f = msbp.sparse_vjp(network, HALF)
    memory = f.init_memory(PARAMS, X)
    dx = jax.jit(jax.grad(lambda x: (f(PARAMS, x, memory=memory) * TARGET).sum()))(X)
    dense = jax.grad(lambda x: (network(PARAMS, x) * TARGET).sum())(X)
    weight = HALF.apply(TARGET, memory["@outputs"])[0].weight
    assert live(dx).sum() == ROWS // 2
    assert_trees_close(dx, dense * weight[:, None])
