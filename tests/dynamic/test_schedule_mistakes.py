"""What schedules refuse, and what they say of it."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msbp_jax as msbp

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (6, 10))
DENSE = {"params": {"a": {"kernel": W, "bias": jnp.ones(10)}, "b": {"kernel": 2 * W[:, :4]}}}
SPARSE = msbp.prune(DENSE, density=0.2)
TX = optax.sgd(0.1, momentum=0.9)
OPT_STATE = TX.init(SPARSE["params"])


@pytest.mark.parametrize("make", [msbp.rigl, msbp.sparse_evolution])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 1.5}, TypeError, "every must be an integer"),
        ({"until": 0}, ValueError, "until must be at least 1"),
        ({"every": 10, "until": 10}, ValueError, "the first change is at step 10: got until=10, .* before it starts"),
        (
            {"fraction": 1.5},
            ValueError,
            r"fraction must lie in \[0, 1\] \(share of the entries that is dropped\), got 1.5",
        ),
        ({"fraction": -0.1}, ValueError, r"fraction must lie in \[0, 1\]"),
        ({"fraction": "all"}, TypeError, "fraction must be a number"),
        ({"fraction": optax.constant_schedule(2.0)}, ValueError, r"fraction\(0\) must lie in \[0, 1\]"),
    ],
)
def test_arguments_of_exchanges(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**{"every": 2, "until": 9, **options})


GRADUAL = {"density": 0.1, "begin": 10, "end": 50, "every": 10}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density must lie in \(0, 1\]"),
        ({"density": 1.1}, ValueError, r"density must lie in \(0, 1\]"),
        ({"density": "small"}, TypeError, "density must be a number"),
        ({"density": None}, ValueError, "a final density with begin=, end= and every=, or stages= alone"),
        ({"stages": {1: 0.5}}, ValueError, "a final density with begin=, end= and every=, or stages= alone"),
        ({"density": None, "stages": {1: 0.5}}, ValueError, "Stages say all"),
        ({"begin": None}, TypeError, "begin must be an integer"),
        ({"begin": 0}, ValueError, "begin must be at least 1"),
        ({"end": 5}, ValueError, "ends before it starts: got begin=10 and end=5"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"initial_density": 0.05}, ValueError, "from initial_density=0.05 to density=0.1, which grows density above"),
        ({"density": 1.0}, ValueError, "prunes nothing"),
        ({"scope": "all"}, ValueError, 'scope must be "layer", "global" or "erdos_renyi"'),
    ],
)
def test_arguments_of_gradual_pruning(options, error, message):
    with pytest.raises(error, match=message):
        msbp.gradual_pruning(**{**GRADUAL, **options})


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ({}, TypeError, "stages must be {step: density}"),
        ([0.5], TypeError, "stages must be {step: density}"),
        ({0: 0.5}, ValueError, "A step of stages must be at least 1"),
        ({"1": 0.5}, TypeError, "A step of stages must be an integer"),
        ({1: 0}, ValueError, r"The density of stage 1 must lie in \(0, 1\]"),
        (
            {1: 0.2, 5: 0.4},
            ValueError,
            "from density 0.2 at step 1 to 0.4 at step 5, which grows density above its cap",
        ),
    ],
)
def test_stages(stages, error, message):
    with pytest.raises(error, match=message):
        msbp.gradual_pruning(stages=stages)


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        (DENSE, {"include": ["c/*"]}, r"include: 'c/\*' matches none of the parameters"),
        (SPARSE, {"include": ["c/*"]}, r"include: 'c/\*' matches none of the sparse weights a/kernel, b/kernel"),
        (DENSE, {"stages": {1: 0.5, 9: 0.001}}, "At density 0.001 nothing is kept of a/kernel, b/kernel"),
        ({"params": {"bias": jnp.ones(3)}}, {}, "no weight to prune among bias"),
        (SPARSE, {"stages": {1: 0.5}}, "density 0.5 keeps 30 entries of a/kernel, and the pattern has 12: .*capacity"),
        (SPARSE, {"stages": {1: 0.5}, "scope": "global"}, "keeps 42 entries of all weights, and the pattern has 17"),
        (SPARSE, {"stages": {1: 0.1}, "stacked": ["a/*"]}, "are sparse already, and their patterns say"),
        (DENSE["params"], {}, 'variables with "params" and "sparsity"'),
    ],
)
def test_what_gradual_pruning_cannot_prune(variables, options, message):
    with pytest.raises(ValueError, match=message):
        msbp.gradual_pruning(**{"stages": {1: 0.5}, **options}).init(variables)


def test_all_of_a_weight_may_not_go():
    """Of all weights together the smallest are all of one."""
    small = {**SPARSE["params"], "b": {"kernel": 1e-6 * SPARSE["params"]["b"]["kernel"]}}
    variables, schedule = {**SPARSE, "params": small}, msbp.gradual_pruning(stages={1: 0.1}, scope="global")
    with pytest.raises(ValueError, match=r"b/kernel, at density 0.1: A mask keeps nothing"):
        schedule.update(TX, variables, OPT_STATE, schedule.init(variables))


def test_gradual_pruning_runs_outside_of_jit():
    schedule = msbp.gradual_pruning(stages={1: 0.1})
    state = schedule.init(SPARSE)
    with pytest.raises(ValueError, match="draws nothing, and takes no key"):
        schedule.init(SPARSE, KEY)
    with pytest.raises(TypeError, match="outside of jit: call update after the compiled step"):
        jax.jit(lambda *carry: schedule.update(TX, *carry)[1])(SPARSE, OPT_STATE, state)
    broken = {**SPARSE["params"], "a": {**SPARSE["params"]["a"], "kernel": jnp.full(12, jnp.nan)}}
    with pytest.raises(ValueError, match="a/kernel has entries that are not finite"):
        schedule.update(TX, {**SPARSE, "params": broken}, OPT_STATE, state)


@pytest.mark.parametrize(
    ("schedule", "key"),
    [(msbp.rigl(every=1, until=9), None), (msbp.sparse_evolution(every=1), KEY), (msbp.static_sparsity(), None)],
)
def test_weights_have_to_be_sparse(schedule, key):
    for variables in (DENSE, {**DENSE, "sparsity": {}}):
        with pytest.raises(ValueError, match=r"None of the weights is sparse.*Prune first"):
            schedule.init(variables, key)
    with pytest.raises(ValueError, match=r"takes variables with .*; got float"):
        schedule.init(1.0, key)
    with pytest.raises(ValueError, match="The sparsity of a/kernel is not a pattern"):
        schedule.init({**SPARSE, "sparsity": {"a": {"kernel": jnp.ones(3)}}}, key)
    state = schedule.init(SPARSE, key)
    whole = {**DENSE, "params": SPARSE["params"]}
    with pytest.raises(ValueError, match='a/kernel has no pattern in "sparsity"'):
        schedule.update(TX, whole, OPT_STATE, state, lambda dense: dense)


def test_keys():
    with pytest.raises(
        ValueError, match=r"SparseEvolution draws at random and needs a key: schedule.init\(variables, jax"
    ):
        msbp.sparse_evolution(every=1).init(SPARSE)
    with pytest.raises(TypeError, match="key must be a typed PRNG key"):
        msbp.sparse_evolution(every=1).init(SPARSE, jnp.zeros(2, jnp.uint32))
    for schedule in (msbp.rigl(every=1, until=9), msbp.static_sparsity()):
        with pytest.raises(ValueError, match="draws nothing, and takes no key"):
            schedule.init(SPARSE, KEY)
    state = msbp.static_sparsity().init(SPARSE)
    with pytest.raises(ValueError, match="has no key"):
        msbp.sparse_evolution(every=1).update(TX, SPARSE, OPT_STATE, state)


def test_blocks_are_not_exchanged():
    blocks = msbp.prune({"params": {"kernel": jnp.ones((8, 8))}}, density=0.5, block=(4, 4))
    with pytest.raises(ValueError, match=r"kernel has blocks of \(4, 4\), and RigL exchanges single entries"):
        msbp.rigl(every=1, until=9).init(blocks)


@pytest.mark.parametrize(
    ("dense_grad_fn", "message"),
    [
        (None, r"RigL grows by the dense gradient: .* got None"),
        (lambda dense: SPARSE["params"], r"of a/kernel one of shape \(6, 10\) was expected, got one of shape \(12,\)"),
        (lambda dense: {"other": W}, "of a/kernel one of shape .* was expected, got gradients of other"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_the_dense_gradient(dense_grad_fn, message, wrap):
    schedule = msbp.rigl(every=1, until=9)
    update = wrap(lambda *carry: schedule.update(TX, *carry, dense_grad_fn)[1])
    with pytest.raises(ValueError, match=message):
        update(SPARSE, OPT_STATE, schedule.init(SPARSE))


@pytest.mark.parametrize("method", ["rigl", "set", "static", "gradual"])
def test_a_pattern_of_another_stage(method):
    schedule = {
        "rigl": msbp.rigl(every=2, until=9),
        "set": msbp.sparse_evolution(every=2),
        "static": msbp.static_sparsity(),
        "gradual": msbp.gradual_pruning(stages={1: 0.15, 2: 0.1}),
    }[method]
    state = schedule.init(SPARSE, KEY if method == "set" else None)
    _, _, state = schedule.update(TX, SPARSE, OPT_STATE, state, lambda dense: dense)
    other = msbp.prune(DENSE, density=0.1)
    entries = 9 if method == "gradual" else 12
    message = f"pattern of a/kernel has 6 entries, and the state at step 1 is of a stage with {entries}"
    with pytest.raises(ValueError, match=message):
        schedule.check(other, state)
    with pytest.raises(ValueError, match=message):
        schedule.update(TX, other, TX.init(other["params"]), state, lambda dense: dense)
    mixed = {**other, "params": SPARSE["params"]}
    with pytest.raises(ValueError, match=r"a/kernel has shape \(12,\), and its pattern is of \(6,\) entries"):
        schedule.check(mixed, state)
    with pytest.raises(ValueError, match="The state is of the weight a/kernel, and the parameters are c"):
        schedule.check({"params": {"c": W}}, state)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_pattern_of_as_many_entries_in_other_places(jitted):
    """Told at every stage, whatever an exchange, inside `jit` or outside, has made of the pattern."""
    schedule = msbp.rigl(every=1, until=9, fraction=0.5)
    waves = lambda dense: jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size)).reshape(w.shape), dense)
    update = lambda variables, opt_state, state: schedule.update(TX, variables, opt_state, state, waves)
    before = schedule.init(SPARSE)
    schedule.check(SPARSE, before)
    variables, _, after = (jax.jit(update) if jitted else update)(SPARSE, OPT_STATE, before)
    schedule.check(variables, after)
    for of, state in ((SPARSE, after), (variables, before)):
        with pytest.raises(ValueError, match="The entries of a/kernel stand in other places than those that the state"):
            schedule.check(of, state)
    unmarked, _, state = update(SPARSE, OPT_STATE, before._replace(marks=None))  # of an older checkpoint
    schedule.check(unmarked, state)
    stages = msbp.gradual_pruning(stages={1: 0.1})
    first, _, state = stages.update(TX, SPARSE, OPT_STATE, stages.init(SPARSE))
    stages.check(first, state)
    with pytest.raises(ValueError, match="stand in other places"):
        stages.check(msbp.prune(DENSE, density=0.1, method="random", key=KEY), state)


def test_an_optimizer_s_state_of_another_stage():
    schedule = msbp.gradual_pruning(stages={1: 0.1})
    other = TX.init(msbp.prune(DENSE, density=0.15)["params"])
    with pytest.raises(ValueError, match=r"holds \(9,\) for a/kernel, .* \(12,\): it is the state of another stage"):
        schedule.update(TX, SPARSE, other, schedule.init(SPARSE))


@pytest.mark.parametrize(
    "make",
    [
        lambda: msbp.rigl(every=1, until=9),
        lambda: msbp.sparse_evolution(every=1),
        msbp.static_sparsity,
        lambda: msbp.gradual_pruning(0.1, begin=1, end=9, every=2, include=["a/*"]),
    ],
)
def test_schedules_are_equal_by_value_and_can_be_pickled(make):
    assert make() == make() == pickle.loads(pickle.dumps(make()))
    assert hash(make()) == hash(make())
    assert make() != msbp.rigl(every=2, until=9)


def test_a_schedule_of_one_s_own():
    class Never(msbp.SparsitySchedule):
        def init(self, variables, key=None):
            return msbp.SparsityState(jnp.int32(0), {})

        def due(self, state):
            return False

        def update(self, tx, variables, opt_state, state, dense_grad_fn=None):
            return dict(variables), opt_state, state._replace(step=state.step + 1)

    schedule = Never()
    _, _, state = schedule.update(TX, SPARSE, OPT_STATE, schedule.init(SPARSE))
    schedule.check(SPARSE, state)
    assert np.asarray(state.step) == 1
    with pytest.raises(TypeError, match="abstract"):
        msbp.SparsitySchedule()
