"""Training by small parts: the narrow network is the masked one, and what is learned stays within its budget."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_find_units import CNN, VARIABLES, WIDTHS, X

import msbp_jax as msbp

KEY = jax.random.key(0)
CLOSE = functools.partial(jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4))
# Sigmoid, so that a unit whose input is 0 has a value that is not.
F = lambda p, x: jax.nn.sigmoid(x @ p["w"] + p["b"][None]) @ p["v"]
UNITS = {"hidden": [("w", 1), ("b", 0), ("v", 0)]}
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (4, 64)),
    "b": jax.random.normal(jax.random.key(2), (64,)),
    "v": jax.random.normal(jax.random.key(3), (64, 3)),
}
ROWS, WANTED = jax.random.normal(jax.random.key(4), (16, 4)), jax.random.normal(jax.random.key(5), (16, 3))


def squares(model, p, x, y):
    return ((model(p, x) - y) ** 2).mean()


def small(budget=0.25, **options):
    return msbp.subnetwork(F, units=UNITS, budget=budget, **options)


def masks_of(sub, chosen):
    return chosen.masks(sub.units(PARAMS))["hidden"].astype(jnp.float32)


def test_the_narrow_network_is_the_masked_one():
    """Loss and gradients, with units that fill up, and the mask behind the activation."""
    sub = small()
    structure = sub.init(PARAMS, ROWS)
    sample = sub.sample(structure, KEY)
    assert sample.first.capacities == sample.second.capacities
    assert sample.first.capacities["hidden"] > sample.first.counts()["hidden"]  # there is something to fill up
    loss, grads, of_structure = jax.jit(sub.value_and_grad(squares))(PARAMS, structure, sample, ROWS, WANTED)

    def masked(p, chosen):
        hidden = jax.nn.sigmoid(ROWS @ p["w"] + p["b"][None]) * masks_of(sub, chosen)[None]
        return ((hidden @ p["v"] - WANTED) ** 2).mean()

    want, want_grads = jax.value_and_grad(masked)(PARAMS, sample.first)
    CLOSE((loss, grads), (want, want_grads))
    s = structure.probabilities["hidden"]
    differ = masks_of(sub, sample.first) - masks_of(sub, sample.second)
    CLOSE(of_structure["hidden"], 0.5 * (want - masked(PARAMS, sample.second)) * differ / jnp.sqrt(s * (1 - s)))


def test_both_samples_serve_the_weights():
    sub = small()
    structure = sub.init(PARAMS)
    sample = sub.sample(structure, KEY)
    turned = sample.replace(first=sample.second, second=sample.first)
    one, other = (sub.value_and_grad(squares)(PARAMS, structure, s, ROWS, WANTED) for s in (sample, turned))
    both = sub.value_and_grad(squares, weights="both")(PARAMS, structure, sample, ROWS, WANTED)
    CLOSE(both[:2], jax.tree.map(lambda a, b: (a + b) / 2, one[:2], other[:2]))
    CLOSE(both[2], one[2])


def test_a_module_with_norms_dropout_and_a_residual():
    """Found units; statistics of units that were not drawn stay; outputs are those of the masked network."""
    units = msbp.find_units(CNN, VARIABLES, X, widths=WIDTHS)
    sub = msbp.subnetwork(CNN, units=units, widths=WIDTHS, budget=0.5)
    structure = sub.init(VARIABLES, X)
    sample = sub.sample(structure, KEY)

    def loss_fn(model, params, stats, x, key):
        variables = {"params": params, "batch_stats": model.narrow(stats)}
        logits, changed = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return (logits**2).mean(), model.widen(stats, changed["batch_stats"])

    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    run = jax.jit(sub.value_and_grad(loss_fn, has_aux=True))
    (_, after), grads, of_structure = run(params, structure, sample, stats, X, KEY)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert {name: g.shape for name, g in of_structure.items()} == {n: (g.size,) for n, g in units.items()}
    masks = sample.first.masks(units)
    moved = after["BatchNorm_1"]["mean"] != stats["BatchNorm_1"]["mean"]
    assert not moved[~masks["inner"]].any()
    assert moved[masks["inner"]].all()
    assert not grads["Conv_1"]["kernel"][..., ~masks["inner"]].any()
    module, variables = sub.extract(VARIABLES, sample.first)
    assert module.widths["inner"] == int(masks["inner"].sum())
    assert module.widths["groups"] == 8 * int(masks["groups"].sum())
    CLOSE(jax.jit(module.apply)(variables, X), jax.jit(whole_with_masks)(masks))


def whole_with_masks(masks):
    """Return the outputs of the whole network with masks behind its activations, written out."""
    p = VARIABLES["params"]
    conv = lambda at, x: nn.Conv(p[f"Conv_{at}"]["bias"].size, (3, 3)).apply({"params": p[f"Conv_{at}"]}, x)
    norm = lambda at, x: nn.BatchNorm(use_running_average=True).apply(
        {"params": p[f"BatchNorm_{at}"], "batch_stats": VARIABLES["batch_stats"][f"BatchNorm_{at}"]}, x
    )
    mask = {name: m.astype(jnp.float32)[None, None, None] for name, m in masks.items()}
    x = nn.relu(norm(0, conv(0, X))) * mask["trunk"]
    y = nn.relu(norm(1, conv(1, x))) * mask["inner"]
    x = nn.max_pool(x + conv(2, y) * mask["trunk"], (2, 2), (2, 2))
    x = nn.relu(nn.GroupNorm(4).apply({"params": p["GroupNorm_0"]}, conv(3, x))) * mask["groups"].repeat(8, -1)
    x = x.reshape(len(x), -1)
    x = nn.relu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None]) * mask["hidden"][0, 0]
    return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"][None]


def trained(steps, kept_only=True, budget=0.25, start=None):
    """Return parameters, optimizer's state, structure and compilations after steps, from a start or the beginning."""
    sub, tx = small(budget, optimizer=optax.adam(0.05)), optax.adam(0.03)

    @jax.jit
    def step(params, opt_state, structure, sample):
        run = sub.value_and_grad(squares, kept_only=kept_only)
        loss, grads, of_structure = run(params, structure, sample, ROWS, WANTED)
        if kept_only:
            params, opt_state = sub.update_kept(tx, grads, opt_state, params, sample.first)
        else:
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state, sub.update(of_structure, structure), loss

    params, opt_state, structure, at = start or (PARAMS, tx.init(PARAMS), sub.init(PARAMS), 0)
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # as Optax has it
        for i in range(at, at + steps):
            sample = sub.sample(structure, jax.random.fold_in(KEY, i))
            params, opt_state, structure, loss = step(params, opt_state, structure, sample)
            losses.append(float(loss))
            s = structure.probabilities["hidden"]
            assert 0 <= float(s.min()) <= float(s.max()) <= 1
            assert float(s.sum()) <= sub_budget(budget, i + 1) * (1 + 1e-5)
    return (params, opt_state, structure, at + steps), losses, step._cache_size()


def sub_budget(budget, step):
    return 64 * float(budget(step) if callable(budget) else budget)


@pytest.mark.parametrize("kept_only", [False, True])
def test_training_learns_within_the_budget(kept_only):
    _, losses, compilations = trained(60, kept_only)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert compilations <= 4


def test_a_schedule_of_the_budget():
    schedule = optax.linear_schedule(1.0, 0.25, 20)
    (_, _, structure, _), _, compilations = trained(30, budget=schedule)
    assert float(structure.probabilities["hidden"].sum()) == pytest.approx(16, rel=1e-3)
    assert compilations <= 10


def test_training_goes_on_to_the_bit():
    half, _, _ = trained(5)
    written = flax.serialization.to_bytes(half[:3])
    blank = jax.tree.map(jnp.zeros_like, half[:3])
    read = flax.serialization.from_bytes(blank, written)
    resumed, _, _ = trained(5, start=(*read, 5))
    straight, _, _ = trained(10)
    jax.tree.map(np.testing.assert_array_equal, resumed[:3], straight[:3])


def test_an_update_of_kept_units_leaves_the_others():
    """The kept ones move as those of a whole update do, at the first step; the momentum of the others stands still."""
    sub, tx = small(), optax.sgd(0.1, momentum=0.9)
    structure = sub.init(PARAMS)
    sample = sub.sample(structure, KEY)
    state = tx.init(PARAMS)
    _, whole, _ = sub.value_and_grad(squares)(PARAMS, structure, sample, ROWS, WANTED)
    _, narrow, _ = sub.value_and_grad(squares, kept_only=True)(PARAMS, structure, sample, ROWS, WANTED)
    CLOSE(narrow, sub.narrow(whole, sample.first, like=PARAMS))
    updates, want_state = tx.update(whole, state, PARAMS)
    want = optax.apply_updates(PARAMS, updates)
    params, got_state = sub.update_kept(tx, narrow, state, PARAMS, sample.first)
    CLOSE((params, got_state), (want, want_state))
    other = sub.sample(structure, jax.random.key(9))
    _, narrow, _ = sub.value_and_grad(squares, kept_only=True)(params, structure, other, ROWS, WANTED)
    after, _ = sub.update_kept(tx, narrow, got_state, params, other.first)
    still = ~other.first.masks(sub.units(PARAMS))["hidden"]
    np.testing.assert_array_equal(after["v"][still], params["v"][still])
    assert (after["v"][~still] != params["v"][~still]).all()


def test_optimizers_of_several_parts():
    """States with parameters left out are narrowed where they are; those of other shapes are refused."""
    sub = small()
    structure = sub.init(PARAMS)
    sample = sub.sample(structure, KEY)
    _, narrow, _ = sub.value_and_grad(squares, kept_only=True)(PARAMS, structure, sample, ROWS, WANTED)
    _, whole, _ = sub.value_and_grad(squares)(PARAMS, structure, sample, ROWS, WANTED)
    labels = {"w": "a", "b": "b", "v": "a"}
    chains = {
        "two": optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.5)}, labels),
        "masked": optax.chain(optax.masked(optax.trace(0.5), {"w": True, "b": False, "v": True}), optax.adam(0.1)),
    }  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # as Optax has it
        for tx in chains.values():
            state = tx.init(PARAMS)
            updates, _ = tx.update(whole, state, PARAMS)
            params, after = sub.update_kept(tx, narrow, state, PARAMS, sample.first)
            CLOSE(params, optax.apply_updates(PARAMS, updates))
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        factored = optax.adafactor(0.1, min_dim_size_to_factor=2)
        with pytest.raises(ValueError, match=r"as Adafactor does\. Use tx\.update with whole gradients"):
            sub.update_kept(factored, narrow, factored.init(PARAMS), PARAMS, sample.first)
        several = optax.MultiSteps(optax.sgd(0.1), 2)
        with pytest.raises(ValueError, match="MultiSteps adds up gradients of several samples"):
            sub.update_kept(several, narrow, several.init(PARAMS), PARAMS, sample.first)


def test_a_layer_is_never_empty():
    """The most probable unit serves; the estimate is that of the loss with this rule, unbiased."""
    f = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    params = {"w": PARAMS["w"][:, :3], "v": PARAMS["v"][:3]}
    sub = msbp.subnetwork(f, units={"h": [("w", 1), ("v", 0)]}, budget=1 / 3 + 1e-6, alpha=0.0)
    structure = sub.init(params).replace(probabilities={"h": jnp.array([0.2, 0.5, 0.3])})

    def loss_of(mask):
        mask = (mask if mask.any() else np.array([False, True, False])).astype(np.float32)
        return float(((f({"w": params["w"], "v": params["v"] * mask[:, None]}, ROWS) - WANTED) ** 2).mean())

    every = [np.array([i & 1, i & 2, i & 4], bool) for i in range(8)]
    losses = jnp.array([loss_of(mask) for mask in every])
    mean = lambda s: sum(loss * jnp.where(mask, s, 1 - s).prod() for mask, loss in zip(every, losses, strict=True))
    want = jax.grad(mean)(structure.probabilities["h"])
    run = jax.jit(sub.value_and_grad(squares))
    found, forced = [], 0
    for i in range(1500):
        sample = sub.sample(structure, jax.random.key(i))
        forced += int((sample.first.drawn["h"] != sample.first.alive["h"]).any())
        assert min(sample.first.counts()["h"], sample.second.counts()["h"]) >= 1
        found.append(run(params, structure, sample, ROWS, WANTED)[2]["h"])
    assert 300 < forced < 550  # .8 x .5 x .7 of the draws
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert (np.abs(np.mean(found, axis=0) - want) < 4 * error).all()


def test_capacities_of_the_sample_before_are_kept():
    sub = small(0.5)
    structure = sub.init(PARAMS)
    sample = sub.sample(structure, KEY)
    fewer = structure.replace(probabilities={"hidden": jnp.full(64, 0.42)})
    alone, after = sub.sample(fewer, KEY), sub.sample(fewer, KEY, sample)
    assert alone.first.capacities["hidden"] < after.first.capacities["hidden"] == sample.first.capacities["hidden"]
    few = structure.replace(probabilities={"hidden": jnp.full(64, 0.1)})
    assert sub.sample(few, KEY, sample).first.capacities["hidden"] < 30


def test_bfloat16_parameters():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    sub = small()
    structure = sub.init(params)
    sample = sub.sample(structure, KEY)
    x, y = ROWS.astype(jnp.bfloat16), WANTED.astype(jnp.bfloat16)
    loss, grads, of_structure = jax.jit(sub.value_and_grad(squares))(params, structure, sample, x, y)
    assert loss.dtype == grads["w"].dtype == jnp.bfloat16
    assert of_structure["hidden"].dtype == jnp.float32


def test_the_best_draw_is_taken_out():
    sub = small()
    (params, _, structure, _), _, _ = trained(40)
    best = sub.best(structure, params, jax.random.key(7), squares, ROWS, WANTED, candidates=5)
    assert best.capacities == best.counts()
    f, little = sub.extract(params, best)
    assert little["w"].shape == (4, best.counts()["hidden"])
    hidden = jax.nn.sigmoid(ROWS @ params["w"] + params["b"][None]) * masks_of(sub, best)[None]
    CLOSE(f(little, ROWS), hidden @ params["v"])
    CLOSE(f(little, ROWS), F(sub.masked(params, best), ROWS))
    samples = [sub.sample(structure, key) for key in jax.random.split(jax.random.key(7), 3)]
    drawn = [chosen for sample in samples for chosen in (sample.first, sample.second)][:5]
    scores = [float(squares(F, sub.masked(params, chosen), ROWS, WANTED)) for chosen in drawn]
    assert float(squares(f, little, ROWS, WANTED)) == pytest.approx(min(scores), rel=1e-4)


def test_an_nnx_module_by_its_state():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 64, rngs=rngs)
            self.last = nnx.Linear(64, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    graph, state = nnx.split(MLP(nnx.Rngs(0)), nnx.Param)
    f = lambda state, x: nnx.merge(graph, state)(x)
    units = msbp.find_units(f, state, ROWS)
    assert [group.size for group in units.values()] == [64]
    sub = msbp.subnetwork(f, units=units, budget=0.25)
    structure = sub.init(state, ROWS)
    sample = sub.sample(structure, KEY)
    _, grads, _ = jax.jit(sub.value_and_grad(squares))(state, structure, sample, ROWS, WANTED)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, state)
    _, little = sub.extract(state, sample.first)
    model = nnx.merge(graph, little)
    CLOSE(model(ROWS), f(sub.masked(state, sample.first), ROWS))


class MLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(3)(x)


UNITS_OF_MLP = {"hidden": [("Dense_0/kernel", 1), ("Dense_0/bias", 0), ("Dense_1/kernel", 0)]}


def test_a_sparse_backward_in_the_small_network():
    """The factory may return a model of `sparse_vjp`."""
    build = lambda widths: msbp.sparse_vjp(MLP(widths["hidden"]), msbp.sample_rows(density=0.5))
    variables = MLP(64).init(KEY, ROWS)
    sub = msbp.subnetwork(build, units=UNITS_OF_MLP, budget=0.25)
    structure = sub.init(variables, ROWS)
    sample = sub.sample(structure, KEY)
    memory = build({"hidden": 64}).init_memory(variables, ROWS)

    def loss_fn(model, params, x, y):
        return ((model.apply({"params": params}, x, memory=memory) - y) ** 2).mean()

    _, grads, _ = jax.jit(sub.value_and_grad(loss_fn))(variables["params"], structure, sample, ROWS, WANTED)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_memory_is_narrow_with_its_layer():
    """What is remembered of units that were not drawn stays; that of the others is the narrow model's own."""
    plan = {"Dense_0/*": msbp.memorized(msbp.top_k(k=2), decay=0.5)}
    build = lambda widths: msbp.sparse_vjp(MLP(widths["hidden"]), plan)
    variables = MLP(64).init(KEY, ROWS)
    sub = msbp.subnetwork(build, units=UNITS_OF_MLP, budget=0.25)
    params, structure = variables["params"], sub.init(variables)
    sample = sub.sample(structure, KEY)
    memory = jax.tree.map(lambda leaf: leaf + 0.5, build({"hidden": 64}).init_memory(variables, ROWS))

    def loss_fn(model, params, memory, x, y):
        return ((model.apply({"params": params}, x, memory=memory) - y) ** 2).mean()

    run = jax.jit(sub.value_and_grad(loss_fn, kept_only=True))
    loss, grads, _, after = run(params, structure, sample, ROWS, WANTED, memory=memory)
    drawn = sample.first.masks(sub.units(params))["hidden"]
    (before_leaf,), (after_leaf,) = jax.tree.leaves(memory), jax.tree.leaves(after)
    np.testing.assert_array_equal(after_leaf[~drawn], before_leaf[~drawn])
    assert (after_leaf[drawn] != before_leaf[drawn]).any()
    exact = msbp.Chosen.of({"hidden": np.asarray(drawn)})
    model, small = sub.extract(params, exact)
    narrow = lambda p, m: loss_fn(model, p, m, ROWS, WANTED)
    own = jax.tree.map(lambda leaf: leaf[drawn], memory)
    want, _, want_memory = msbp.value_and_grad(narrow)(small, own)
    CLOSE(loss, want)
    CLOSE(after_leaf[drawn], jax.tree.leaves(want_memory)[0])
    assert grads["Dense_0"]["kernel"].shape == (4, sample.first.capacities["hidden"])
    with pytest.raises(ValueError, match="A memory is that of the first sample"):
        sub.value_and_grad(loss_fn, weights="both")(params, structure, sample, ROWS, WANTED, memory=memory)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"units": {"hidden": [("w", 2)]}}, ValueError, r"Group 'hidden': w has shape \(4, 64\), and no axis 2"),
        ({"units": {"hidden": [("w", 1), ("q", 0)]}}, ValueError, "'q' matches none of b, v, w"),
        ({"units": {"hidden": [("w", 1), ("v", 1)]}}, ValueError, "of 3 entries, cannot be cut into as many"),
        (
            {"units": {"a": [("w", 1)], "c": [("b", 0), ("w", 1)]}},
            ValueError,
            "Axis 1 of w is of two groups, 'a' and 'c'",
        ),
        ({"units": {"a": [("w", 1, 64)]}}, ValueError, "Group 'a' has a single unit"),
        ({"units": {"a": [("w", 1, 0)]}}, ValueError, "at least one entry belongs to a unit"),
        ({"units": {"a": [("w", 1.5)]}}, TypeError, "expected whole numbers behind the pattern"),
        ({"units": {"a": ["w"]}}, TypeError, "expected \\(pattern of paths, axis\\)"),
        ({"units": {"a": "w"}}, TypeError, "Group 'a' must be a list of axes"),
        ({"units": ["w"]}, TypeError, "units must be"),
        ({"budget": 65}, ValueError, "A budget of 65 is 65 units, of 64 in 1 groups"),
        ({"budget": 0.001}, ValueError, "it must leave at least one for each group"),
        ({"budget": 0.0}, ValueError, "budget must be a share of the units"),
        ({"budget": 1.5}, ValueError, "or a whole number of them, got 1.5"),
        ({"budget": "half"}, TypeError, "budget must be a number, or an Optax schedule"),
        ({"alpha": 1.5}, ValueError, "alpha must lie in"),
        ({"rung_ratio": 1.0}, ValueError, "rung_ratio must lie in"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        msbp.subnetwork(F, **{"units": UNITS, "budget": 0.25, **options}).init(PARAMS)


def test_other_things_that_are_refused():
    sub = small()
    structure = sub.init(PARAMS)
    sample = sub.sample(structure, KEY)
    with pytest.raises(TypeError, match="subnetwork takes a function"):
        msbp.subnetwork(3, units=UNITS, budget=0.5)
    with pytest.raises(ValueError, match=r"With 32 of the 64 units of 'hidden' the model does not run.*TypeError"):
        msbp.subnetwork(F, units={"hidden": UNITS["hidden"][:2]}, budget=0.5).init(PARAMS, ROWS)
    normed = lambda p, x: (h := x @ p["w"]) / (1 + jnp.square(h).mean(1, keepdims=True)) @ p["v"]
    with pytest.raises(ValueError, match=r"units of 'hidden' cannot be left out: v\[0\]: it is reduced by reduce_sum"):
        msbp.subnetwork(normed, units={"hidden": [("w", 1), ("v", 0)]}, budget=0.5).init(PARAMS, ROWS)
    other = sub.init(
        {name: jnp.concatenate([leaf, leaf], axis=-1 if name != "v" else 0) for name, leaf in PARAMS.items()}
    )
    with pytest.raises(ValueError, match=r"The structure has probabilities of \{'hidden': 128\} units"):
        sub.value_and_grad(squares)(PARAMS, other, sample, ROWS, WANTED)
    for got, schedule in {
        "0 units": lambda step: jnp.where(step > 0, 0.0, 0.5),
        "nan": lambda step: jnp.where(step > 0, jnp.nan, 0.5),
    }.items():
        scheduled = small(schedule)
        with pytest.raises(ValueError, match=f"The budget at step 1 is {got}"):
            scheduled.sample(scheduled.init(PARAMS).replace(step=jnp.int32(1)), KEY)
    with pytest.raises(TypeError, match=r"call it outside of jax\.jit"):
        jax.jit(lambda s: sub.sample(s, KEY).first.index)(structure)
    run = lambda loss, **options: sub.value_and_grad(loss, **options)(PARAMS, structure, sample, ROWS, WANTED)
    with pytest.raises(TypeError, match=r"The loss must be a real scalar, got shape \(16, 3\)"):
        run(lambda model, p, x, y: model(p, x) - y)
    with pytest.raises(ValueError, match='weights must be "first" or "both"'):
        run(squares, weights="second")
    with pytest.raises(ValueError, match="The gradient of both samples is of the units of either"):
        run(squares, weights="both", kept_only=True)
    _, _, of_structure = run(lambda model, p, x, y: squares(model, p, x, y) * jnp.nan)
    with jax.numpy_dtype_promotion("standard"):  # as Optax has it
        broken = sub.update(of_structure, structure)
    with pytest.raises(ValueError, match="Probabilities of 'hidden' are not finite: the loss of an earlier step"):
        sub.sample(broken, KEY)
    off = lambda s: structure.replace(probabilities={"hidden": s})
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -0.5 to"):
        sub.sample(off(jnp.full(64, 0.1).at[3].set(-0.5)), KEY)
    with pytest.raises(ValueError, match=r"add up to 32, above the budget of 16\. Was the structure of another budget"):
        sub.sample(off(jnp.full(64, 0.5)), KEY)
    none = sample.first.replace(alive={"hidden": jnp.zeros_like(sample.first.alive["hidden"])})
    with pytest.raises(ValueError, match="The sample has no unit of hidden: a layer would be empty"):
        sub.extract(PARAMS, none)
    with pytest.raises(ValueError, match="No candidate has a finite score"):
        sub.best(structure, PARAMS, KEY, lambda *_: jnp.nan, candidates=2)
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        sub.best(structure, PARAMS, KEY, lambda *_: 0.0, candidates=0)


def test_rungs_are_few_and_hold_every_sample():
    sub = small(0.5)
    structure = sub.init(PARAMS)
    seen = set()
    for i in range(30):
        sample = sub.sample(structure, jax.random.key(i))
        for chosen in (sample.first, sample.second):
            assert chosen.counts()["hidden"] <= chosen.capacities["hidden"]
            index = np.asarray(chosen.index["hidden"])
            assert len(np.unique(index)) == len(index)
        seen.add(sample.first.capacities["hidden"])
    assert len(seen) <= 2
