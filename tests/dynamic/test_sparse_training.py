"""Whole trainings: stopped and restored at any stage, with the same bits; and what a pattern that moves is good for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from sklearn.datasets import load_digits
from twins import assert_trees_equal

import msbp_jax as msbp

KEY = jax.random.key(0)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Orbax's own
    pytest.mark.filterwarnings("ignore::UserWarning:orbax"),
]


@pytest.fixture(autouse=True)
def _as_optax_has_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


class MLP(nn.Module):
    width: int = 24

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def bits(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)


class Run:
    """A training by one schedule, whose loop is the same for all."""

    def __init__(self, schedule, tx, module, x, y):
        self.schedule, self.tx = schedule, tx
        model = msbp.sparse_weights(module)
        loss = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        @jax.jit
        def step(variables, opt_state, state):
            rest = {name: tree for name, tree in variables.items() if name != "params"}
            apply = (model if "sparsity" in variables else module).apply
            grads = jax.grad(lambda params: loss(apply({"params": params, **rest}, x)))(variables["params"])
            updates, opt_state = tx.update(grads, opt_state, variables["params"])
            variables = {**variables, "params": optax.apply_updates(variables["params"], updates)}
            dense_grad_fn = jax.grad(lambda params: loss(module.apply({"params": params}, x)))
            if schedule.changes_shapes:
                return variables, opt_state
            return schedule.update(tx, variables, opt_state, state, dense_grad_fn)

        self.compiled = step

    def start(self, variables, key=None):
        return variables, self.tx.init(variables["params"]), self.schedule.init(variables, key)

    def step(self, variables, opt_state, state):
        if not self.schedule.changes_shapes:
            return self.compiled(variables, opt_state, state)
        variables, opt_state = self.compiled(variables, opt_state, None)
        return self.schedule.update(self.tx, variables, opt_state, state)


SCHEDULES = {
    "rigl": msbp.rigl(every=2, until=20),
    "set": msbp.sparse_evolution(every=2),
    "static": msbp.static_sparsity(),
    "gradual": msbp.gradual_pruning(stages={2: 0.5, 4: 0.3}),
    "global": msbp.gradual_pruning(stages={2: 0.5, 4: 0.3}, scope="global"),
    "sparser": msbp.gradual_pruning(stages={2: 0.5, 4: 0.3}),  # of variables that are sparse already
}


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("rigl", 3),
        ("set", 3),
        ("static", 3),
        *(("gradual", stop) for stop in (1, 2, 3, 5)),
        ("global", 3),
        ("sparser", 3),
    ],
)
def test_a_run_that_was_stopped_in_a_stage_has_the_same_bits(name, stop, tmp_path):
    schedule, tx = SCHEDULES[name], optax.sgd(0.1, momentum=0.9)
    x, y = jax.random.normal(KEY, (16, 12)), jnp.arange(16) % 10
    run = Run(schedule, tx, MLP(), x, y)
    key = KEY if name == "set" else None

    def begin(seed):
        dense = MLP().init(jax.random.key(seed), x)
        return dense if name in ("gradual", "global") else msbp.prune(dense, density=0.6 if name == "sparser" else 0.2)

    carry = run.start(begin(0), key)
    for number in range(1, 7):
        carry = run.step(*carry)
        if number == stop:
            saved = dict(zip(("variables", "opt_state", "state"), carry, strict=True))
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", saved.pop("state"))
                checkpointer.save(tmp_path / "rest", saved)
    if name == "gradual":
        assert run.compiled._cache_size() == 3  # dense, and two stages
    # Another process knows the model, and not its numbers.
    other = begin(9)
    with ocp.StandardCheckpointer() as checkpointer:
        abstract = lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        state = checkpointer.restore(tmp_path / "state", abstract(schedule.init(other, key)))
        variables = schedule.like(other, state)
        rest = {"variables": variables, "opt_state": jax.eval_shape(tx.init, variables["params"])}
        back = checkpointer.restore(tmp_path / "rest", rest)
    again = back["variables"], back["opt_state"], state
    schedule.check(again[0], again[2])
    assert int(again[2].step) == stop
    for _ in range(stop, 6):
        again = run.step(*again)
    assert_trees_equal(bits(again), bits(carry))
    if name == "gradual" and stop == 3:
        later = msbp.prune(MLP().init(KEY, x), density=0.2)
        with pytest.raises(ValueError, match=r"Dense_0/kernel has 58 entries, and the state at step 3 .* with 144"):
            schedule.check(later, state)


def test_rigl_learns_digits_where_a_random_pattern_stays_behind():
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    module, tx = MLP(64), optax.adam(1e-2)
    dense = module.init(KEY, x[:1])
    variables = msbp.prune(dense, density=0.05, method="random", key=jax.random.key(1))
    reached = {}
    for name, schedule in (("rigl", msbp.rigl(every=10, until=120)), ("static", msbp.static_sparsity())):
        run = Run(schedule, tx, module, x[:1400], y[:1400])
        carry = run.start(variables)
        for _ in range(150):
            carry = run.step(*carry)
        logits = module.apply(msbp.densify(carry[0]), x[1400:])
        reached[name] = float((logits.argmax(-1) == y[1400:]).mean())
        assert carry[0]["params"]["Dense_0"]["kernel"].shape == (round(0.05 * 64 * 64),)
    assert reached["rigl"] > 0.75
    assert reached["rigl"] > reached["static"] + 0.1
