"""Gradual pruning: the densities of each stage, and the same training as a dense one with masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msbp_jax as msbp

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _as_optax_has_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def problem():
    keys = jax.random.split(KEY, 4)
    dense = {
        "a": {"kernel": jax.random.normal(keys[0], (12, 16)), "bias": jnp.zeros((1, 16))},
        "b": {"kernel": jax.random.normal(keys[1], (16, 4))},
    }
    x = jax.random.normal(keys[2], (32, 12))
    return dense, x, jnp.sin(x @ jax.random.normal(keys[3], (12, 4)))


def test_the_densities_are_those_of_the_formula():
    schedule = msbp.gradual_pruning(0.1, begin=10, end=50, every=10, initial_density=0.9)
    for step in range(10, 51, 10):
        want = 0.1 + (0.9 - 0.1) * (1 - (step - 10) / (5 - 1) / 10) ** 3
        assert schedule.density(step) == schedule.density(step + 9) == pytest.approx(want)
    assert schedule.density(9) == 1
    assert schedule.density(10**9) == pytest.approx(0.1)
    uneven = msbp.gradual_pruning(0.1, begin=10, end=25, every=10)
    assert list(uneven.stages) == [20, 25]  # at the first one nothing is pruned
    at_once = msbp.gradual_pruning(0.1, begin=5, end=5, every=1)
    assert at_once.stages == {5: 0.1}
    given = msbp.gradual_pruning(stages={3: 0.5, 1: 1.0, 9: 0.2, 7: 0.5})
    assert given.stages == {3: 0.5, 9: 0.2}


def test_sparseprop_s_stages():
    """Ten dense epochs, 5 % pruned, then every ten epochs until the eightieth; twenty of fine-tuning."""
    epoch = 3
    schedule = msbp.gradual_pruning(0.05, begin=10 * epoch, end=80 * epoch, every=10 * epoch, initial_density=0.95)
    assert [step // epoch for step in schedule.stages] == [10, 20, 30, 40, 50, 60, 70, 80]
    shares = list(schedule.stages.values())
    assert shares[0] == pytest.approx(0.95)
    assert shares[-1] == pytest.approx(0.05)
    assert (np.diff(shares) < 0).all()


def masked_twin(tx, dense, x, y, stages, steps):
    """Return dense parameters after a training in which masks are applied to weights, gradients and moments."""
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), dense)
    keep = lambda tree: jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0), masks, tree)
    params, opt_state = dense, tx.init(dense)
    grad = jax.jit(jax.grad(lambda params: ((network(params, x) - y) ** 2).mean()))
    for step in range(1, steps + 1):
        updates, opt_state = tx.update(keep(grad(params)), opt_state, params)
        params = keep(optax.apply_updates(params, keep(updates)))
        if step not in stages:
            continue
        for layer in ("a", "b"):
            w, was = np.asarray(params[layer]["kernel"]), np.asarray(masks[layer]["kernel"])
            order = np.argsort(-np.where(was, np.abs(w), -1).ravel(), kind="stable")[: round(stages[step] * w.size)]
            mask = np.zeros(w.size, bool)
            mask[order] = True
            masks[layer]["kernel"] = jnp.asarray(mask.reshape(w.shape))
        params = keep(params)
        opt_state = optax.tree_utils.tree_map_params(tx, lambda leaf, mask: jnp.where(mask, leaf, 0), opt_state, masks)
    return params


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_it_is_the_training_of_a_dense_model_with_masks(name):
    """Moments that were orphaned, as where the parameter is replaced and the optimizer not told, would differ."""
    stages, steps = {3: 0.5, 6: 0.1}, 10
    with jax.enable_x64(True):
        dense, x, y = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), problem())
        tx = {"momentum": optax.sgd(0.05, momentum=0.9), "adam": optax.adam(1e-2)}[name]
        schedule = msbp.gradual_pruning(stages=stages)
        variables = {"params": dense}
        opt_state, state = tx.init(dense), schedule.init(variables)
        model = msbp.sparse_weights(network)

        @jax.jit
        def step(params, sparsity, opt_state):
            f = (lambda params: model(params, sparsity, x)) if sparsity else lambda params: network(params, x)
            grads = jax.grad(lambda params: ((f(params) - y) ** 2).mean())(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        before, changes = np.ones((12, 16), bool), []
        for number in range(1, steps + 1):
            params, opt_state = step(variables["params"], variables.get("sparsity", {}), opt_state)
            if schedule.due(state):
                changes.append(number)
            variables, opt_state, state = schedule.update(tx, {**variables, "params": params}, opt_state, state)
            if number in stages:
                mask = np.asarray(variables["sparsity"]["a"]["kernel"].mask())
                assert mask.sum() == round(stages[number] * mask.size)
                assert not (mask & ~before).any()
                before = mask
        assert changes == list(stages)
        assert step._cache_size() == len(stages) + 1  # one program a stage
        want = masked_twin(tx, dense, x, y, stages, steps)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        jax.tree.map(close, msbp.densify(variables)["params"], want)


def test_all_weights_together_and_those_that_are_named():
    dense, _, _ = problem()
    tx = optax.adam(1e-3)
    schedule = msbp.gradual_pruning(stages={1: 0.2}, scope="global")
    variables, opt_state, state = {"params": dense}, tx.init(dense), schedule.init({"params": dense})
    halved = msbp.prune({"params": dense}, density=0.5)
    for begin in (variables, halved):  # the largest of all are among the larger half of each
        opt_state, state = tx.init(begin["params"]), schedule.init(begin)
        variables, opt_state, state = schedule.update(tx, begin, opt_state, state)
        sizes = [variables["params"][layer]["kernel"].size for layer in ("a", "b")]
        assert sum(sizes) == round(0.2 * 256)
        kernels = [np.asarray(dense[layer]["kernel"]) for layer in ("a", "b")]
        least = np.sort(np.concatenate([np.abs(w).ravel() for w in kernels]))[-sum(sizes)]
        for layer, w in zip(("a", "b"), kernels, strict=True):
            mask = np.asarray(variables["sparsity"][layer]["kernel"].mask())
            np.testing.assert_array_equal(mask, np.abs(w) >= least)
        assert opt_state[0].mu["a"]["kernel"].shape == (sizes[0],)
    named = msbp.gradual_pruning(stages={1: 0.5, 2: 0.25}, include=["a/kernel"])
    variables, opt_state, state = {"params": dense}, tx.init(dense), named.init({"params": dense})
    assert list(state.entries) == ["a/kernel"]
    variables, opt_state, state = named.update(tx, variables, opt_state, state)
    assert variables["params"]["a"]["kernel"].shape == (96,)
    assert variables["params"]["b"]["kernel"].shape == (16, 4)


@pytest.mark.parametrize("options", [{"stacked": ["w"]}, {"block": (4, 2)}, {"scope": "erdos_renyi"}])
def test_weights_of_other_kinds(options):
    shape = (3, 8, 6) if "stacked" in options else (8, 6)
    w, tx = jax.random.normal(KEY, shape), optax.sgd(0.1, momentum=0.9)
    schedule = msbp.gradual_pruning(stages={1: 0.5, 2: 0.25}, include=["w"], **options)
    variables = {"params": {"w": w, "v": jnp.ones((8, 8))}}
    opt_state, state = jax.tree.map(jnp.ones_like, tx.init(variables["params"])), schedule.init(variables)
    for share in (0.5, 0.25):
        variables, opt_state, state = schedule.update(tx, variables, opt_state, state)
        once = msbp.prune({"params": {"w": w}}, density=share, include=["w"], **options)
        jax.tree.map(np.testing.assert_array_equal, variables["sparsity"], once["sparsity"])
        np.testing.assert_array_equal(variables["params"]["w"], once["params"]["w"])
        assert (np.asarray(opt_state[0].trace["w"]) == 1).all()


def test_an_entry_of_0_is_more_than_none():
    """Pruning goes on among the entries that there are."""
    mask = np.arange(12).reshape(3, 4) % 2 == 1
    variables = msbp.prune({"params": jnp.zeros((3, 4))}, masks=mask)
    schedule, tx = msbp.gradual_pruning(stages={1: 0.25}), optax.sgd(0.1)
    new, _, _ = schedule.update(tx, variables, tx.init(variables["params"]), schedule.init(variables))
    kept = np.asarray(new["sparsity"]["params"].mask())
    assert kept.sum() == 3
    assert not (kept & ~mask).any()


def test_further_from_variables_that_are_sparse():
    dense, _, _ = problem()
    variables = msbp.prune({"params": dense}, density=0.5)
    schedule, tx = msbp.gradual_pruning(0.25, begin=1, end=3, every=1, initial_density=0.5), optax.sgd(0.1)
    opt_state, state = tx.init(variables["params"]), schedule.init(variables)
    for _ in range(3):
        variables, opt_state, state = schedule.update(tx, variables, opt_state, state)
    assert variables["params"]["a"]["kernel"].shape == (48,)
    with pytest.raises(ValueError, match=r"density 0.75 keeps 144 entries of a/kernel, and the pattern has 48"):
        msbp.gradual_pruning(stages={1: 0.75}).init(variables)
