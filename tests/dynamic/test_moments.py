"""What optimizers hold follows the weights, in whatever they are wrapped; what cannot follow is refused by name."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msbp_jax as msbp
from msbp_jax.weights import scattered

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (6, 8))
PARAMS = {"a": {"kernel": W, "bias": jnp.ones(8)}, "b": {"kernel": jnp.ones((8, 3))}}
LABELS = {"a": {"kernel": "adam", "bias": "sgd"}, "b": {"kernel": "sgd"}}
DECAYED = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3), optax.ema(0.9)),
    "masked": optax.masked(optax.adam(1e-3), DECAYED),
    "masked by a tree": optax.masked(optax.adam(1e-3), {"a": {"kernel": True, "bias": False}, "b": False}),
    "multi_transform": optax.multi_transform({"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1, momentum=0.9)}, LABELS),
    "labels by a function of paths": optax.partition(
        {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1, momentum=0.9)},
        lambda params: flax.traverse_util.path_aware_map(
            lambda path, _: "adam" if path[-1] == "kernel" else "sgd", params
        ),
    ),
    "labels by a function of a dict": optax.chain(
        optax.partition(
            {"a": optax.adam(1e-3), "b": optax.sgd(0.1)}, lambda params: {name: name for name, _ in params.items()}
        ),
        optax.ema(0.9),
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 4),
    "MultiSteps as a transformation": optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(),
    "amsgrad": optax.amsgrad(1e-3),
    "lion": optax.lion(1e-3),
    "a copy of the weights": optax.contrib.schedule_free_sgd(0.1),
    "bfloat16 moments": optax.adam(1e-3, mu_dtype=jnp.bfloat16),
    "adafactor, small": optax.adafactor(1e-3),
}


@pytest.fixture(autouse=True)
def _as_optax_has_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def numbered(opt_state):
    """Return a state whose every number of a moment is its own, 1 and up."""
    count = iter(range(1, 99))

    def fill(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.asarray((next(count) + np.arange(leaf.size) / 128).reshape(leaf.shape).astype(leaf.dtype))

    return jax.tree.map(fill, opt_state)


def in_dense_shape(opt_state, sparsity):
    """Return the leaves of a state, those of the sparse weight as dense arrays."""
    pattern = sparsity["a"]["kernel"]
    size = pattern.inputs.shape
    back = lambda leaf: np.asarray(scattered(pattern, leaf))
    return [back(leaf) if np.shape(leaf) == size else np.asarray(leaf) for leaf in jax.tree.leaves(opt_state)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["set", "gradual"])
def test_moments_follow(name, method):
    tx = OPTIMIZERS[name]
    if method == "set":
        variables = msbp.prune({"params": PARAMS}, density=0.5, include=["a/kernel"])
        schedule = msbp.sparse_evolution(every=1, fraction=0.5)
        state = schedule.init(variables, KEY)
        before = variables["sparsity"]
        was = np.asarray(before["a"]["kernel"].mask())
    else:
        variables = {"params": PARAMS}
        schedule = msbp.gradual_pruning(stages={1: 0.5}, include=["a/kernel"])
        state, before, was = schedule.init(variables), None, np.ones((6, 8), bool)
    opt_state = numbered(tx.init(variables["params"]))
    new, moved, _ = schedule.update(tx, variables, opt_state, state)
    stays = was & np.asarray(new["sparsity"]["a"]["kernel"].mask())
    assert stays.sum() == (12 if method == "set" else 24)
    old_leaves = jax.tree.leaves(opt_state) if before is None else in_dense_shape(opt_state, before)
    followed = 0
    for old, now in zip(old_leaves, in_dense_shape(moved, new["sparsity"]), strict=True):
        if np.shape(now) == (6, 8):
            np.testing.assert_array_equal(now.astype(np.float32), np.where(stays, np.asarray(old, np.float32), 0))
            followed += 1
        else:
            np.testing.assert_array_equal(now, np.asarray(old))
    assert followed >= 1
    fresh = jax.eval_shape(tx.init, new["params"])
    assert jax.tree.structure(moved) == jax.tree.structure(fresh)
    assert [leaf.shape for leaf in jax.tree.leaves(moved)] == [leaf.shape for leaf in jax.tree.leaves(fresh)]
    jax.eval_shape(tx.update, new["params"], moved, new["params"])  # and goes on


def test_an_optimizer_of_factors_is_refused_by_name():
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=4)
    schedule = msbp.gradual_pruning(stages={1: 0.5}, include=["a/kernel"])
    variables = {"params": PARAMS}
    with pytest.raises(ValueError, match=r"The optimizer holds .* for a/kernel, whose .* shape \(6, 8\): .*Adafactor"):
        schedule.update(tx, variables, tx.init(PARAMS), schedule.init(variables))
    blocks = msbp.prune({"params": {"w": jnp.ones((5, 6, 8))}}, density=0.5, stacked=["w"], include=["w"])
    evolution = msbp.sparse_evolution(every=1)
    with pytest.raises(ValueError, match=r"The optimizer holds \(5,\) for w, whose parameter has shape \(5, 24\)"):
        evolution.update(tx, blocks, tx.init(blocks["params"]), evolution.init(blocks, KEY))


def test_an_optimizer_that_goes_by_shapes_is_refused():
    """Muon's own are matrices: a leaf of values it would give to Adam."""
    tx = optax.contrib.muon(1e-3)
    schedule, variables = msbp.gradual_pruning(stages={1: 0.5}, include=["a/kernel"]), {"params": PARAMS}
    with pytest.raises(ValueError, match=r"another state than of dense ones, at .*Muon"):
        schedule.update(tx, variables, tx.init(PARAMS), schedule.init(variables))


def test_a_history_of_gradients_is_refused():
    tx = optax.scale_by_lbfgs(memory_size=3)
    variables = msbp.prune({"params": PARAMS}, density=0.5, include=["a/kernel"])
    schedule = msbp.sparse_evolution(every=1)
    with pytest.raises(ValueError, match=r"The optimizer holds \(3, 24\) for a/kernel"):
        schedule.update(tx, variables, tx.init(variables["params"]), schedule.init(variables, KEY))


def test_a_state_of_something_else_is_refused():
    variables = msbp.prune({"params": PARAMS}, density=0.5, include=["a/kernel"])
    schedule, tx = msbp.sparse_evolution(every=1), optax.adam(1e-3)
    state = schedule.init(variables, KEY)
    with pytest.raises(ValueError, match=r"not one that tx.init makes of these parameters"):
        schedule.update(tx, variables, optax.sgd(0.1, momentum=0.9).init(variables["params"]), state)
    with pytest.raises(ValueError, match=r"not one that tx.init makes of these parameters"):
        schedule.update(tx, variables, tx.init({"other": jnp.ones(3)}), state)
    other = tx.init(msbp.prune({"params": PARAMS}, density=0.1, include=["a/kernel"])["params"])
    with pytest.raises(ValueError, match=r"holds \(5,\) for a/kernel, whose .* \(24,\): it is the state of another"):
        schedule.update(tx, variables, other, state)
    adam = tx.init(variables["params"])
    with pytest.raises(ValueError, match=r"not one that tx.init makes of these parameters"):
        schedule.update(tx, variables, (adam[0]._replace(count={"a": 1, "b": 2}), *adam[1:]), state)
    flat = optax.flatten(tx)
    with pytest.raises(ValueError, match=r"flattened parameters \(optax.flatten\)"):
        schedule.update(flat, variables, flat.init(variables["params"]), state)
    with pytest.raises(TypeError, match=r"takes the optimizer first, an optax.GradientTransformation"):
        schedule.update(variables, variables, tx.init(variables["params"]), state)
