"""Statistics that Flax overwrites with their "gradient" (amax histories and scales of float8 products)."""

import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import optax
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

OWG = "_overwrite_with_gradient"
X = jax.random.normal(jax.random.key(0), (16, 32))


class Net(nn.Module):
    """A float8 layer, and one of full precision whose backward is sparse."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x))
        return nn.Dense(80)(x)


def setup(sparsifier):
    model = msbp.sparse_vjp(Net(), sparsifier)
    variables = model.init(jax.random.key(1), X)
    loss = lambda p, m, x: (model.apply(p, x, memory=m) ** 2).mean()
    return model, variables, model.init_memory(variables, X), loss


def plain_step(state, x):
    grads = jax.grad(lambda p: (Net().apply(p, x) ** 2).mean())(state.params)
    return state.apply_gradients(grads=grads)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_no_optimizer_touches_them(own_optimizer):
    """They take on their new values, as in Flax's TrainState, with the state's optimizer or with another."""
    model, variables, memory, loss = setup(msbp.top_k(k=80))
    tx = optax.sgd(0.1, momentum=0.9)
    plain = flax.training.train_state.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)
    state = msbp.TrainState.create(apply_fn=model.apply, params=jax.tree.map(jnp.copy, variables), tx=tx, memory=memory)
    step = msbp.train_step(loss, tx) if own_optimizer else msbp.train_step(loss)
    for scale in (1.0, 2.0, 4.0):
        state, _ = step(state, X * scale)
        plain = plain_step(plain, X * scale)
    assert_trees_close(state.params, plain.params)
    assert state.params[OWG]["Dense_0"]["Fp8DirectDotGeneralOp_0"]["input_scale"] != 1


def test_a_sparse_layer_beside_them():
    _, variables, memory, loss = setup(msbp.memorized(msbp.top_k(k=6), 0.8))
    assert set(memory) == {"Dense_1/kernel"}
    _, grads, after = msbp.value_and_grad(loss)(variables, memory, X)
    want = jax.grad(lambda p: (Net().apply(p, X) ** 2).mean())(variables)
    names = [name for name in want[OWG]["Dense_0"]["Fp8DirectDotGeneralOp_0"] if not name.startswith("output_grad")]
    assert {"input_scale", "kernel_scale"} <= set(names)
    for name in names:  # what the forward pass alone decides
        assert_trees_equal(*(g[OWG]["Dense_0"]["Fp8DirectDotGeneralOp_0"][name] for g in (grads, want)))
    assert after["Dense_1/kernel"].residual.any()


def test_microbatches_hand_them_on():
    """Each part sees what the one before it left, and the last one's are returned: no mean is taken of a maximum."""
    _, variables, memory, loss = setup(msbp.top_k(k=80))
    _, grads, _ = msbp.value_and_grad(loss, microbatches=4)(variables, memory, X)
    want, total = variables, jax.tree.map(jnp.zeros_like, variables["params"])
    for part in X.reshape(4, 4, 32):
        got = jax.grad(lambda p, part=part: (Net().apply(p, part) ** 2).mean())(want)
        want = want | {OWG: got[OWG]}
        total = jax.tree.map(jnp.add, total, got["params"])
    assert_trees_close(grads[OWG], want[OWG])
    assert_trees_close(grads["params"], jax.tree.map(lambda t: t / 4, total))
