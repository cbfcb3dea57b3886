"""Training with sampled rows: keys that move, microbatches, members, checkpoints, scaling, states, and what is told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

ROWS = 16
HALF = msbp.sample_rows(density=0.5)
SAMPLE = msbp.sample_rows(efficiency=0.8)
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (8, 64)) / 3, "v": jax.random.normal(KEYS[1], (64, 32)) / 8}
X, TARGET = jax.random.normal(KEYS[2], (ROWS, 8)), jax.random.normal(KEYS[3], (ROWS, 32))


def network(p, x):
    """The probe's gradient is what enters, row by row."""
    return jnp.tanh(x @ p["w"]) @ p["v"] + p.get("probe", jnp.zeros((len(x), 32)))


PROBED = PARAMS | {"probe": jnp.zeros((ROWS, 32))}


def loss_of(f):
    return lambda p, m, x=X, t=TARGET: ((f(p, x, memory=m) - t) ** 2).mean()


def kept(grads):
    return tuple(np.flatnonzero(np.asarray(grads["probe"]).any(axis=1)).tolist())


def keys_of(memory):
    return np.asarray(jax.random.key_data(memory["@outputs"].key))


F = msbp.sparse_vjp(network, HALF)
MEMORY = F.init_memory(PROBED, X)


def test_every_step_draws_anew():
    step, memory, seen = jax.jit(msbp.value_and_grad(loss_of(F))), MEMORY, []
    for number in range(5):
        before = keys_of(memory)
        _, grads, memory = step(PROBED, memory)
        seen.append(kept(grads))
        assert (keys_of(memory) != before).any()
        assert float(memory["@outputs"].steps) == number + 1
    assert {len(rows) for rows in seen} == {ROWS // 2}
    assert len(set(seen)) == 5


def test_a_step_can_be_run_again():
    assert_trees_equal(*(msbp.value_and_grad(loss_of(F))(PROBED, MEMORY) for _ in range(2)))


def test_jax_grad_samples_and_leaves_the_memory():
    grads = jax.grad(lambda p: loss_of(F)(p, MEMORY))(PROBED)
    assert len(kept(grads)) == ROWS // 2
    assert_trees_equal(grads, jax.grad(lambda p: loss_of(F)(p, MEMORY))(PROBED))


def test_without_a_memory_it_cannot_be_differentiated():
    with pytest.raises(ValueError, match="memory"):
        jax.grad(lambda p: F(p, X).sum())(PROBED)


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_draw_each_for_themselves(count):
    """Of their own rows: each keeps a half of them."""
    size = ROWS // count
    f = msbp.sparse_vjp(lambda p, x: jnp.tanh(x @ p["w"]), HALF)
    eye = jnp.tile(jnp.eye(size), (count, 1))  # a row of dw is the sum of what enters at a place of all microbatches
    params = {"w": jnp.zeros((size, 64))}
    loss = lambda p, m, x: jnp.sum(f(p, x, memory=m))
    memory = f.init_memory(params, eye[:size])
    _, grads, after = jax.jit(msbp.value_and_grad(loss, microbatches=count))(params, memory, eye)
    want, total = memory, 0
    for _ in range(count):
        _, part, want = msbp.value_and_grad(loss)(params, want, eye[:size])
        total = total + part["w"] / count
    assert_trees_close(grads["w"], total)
    assert float(after["@outputs"].kept) == size // 2
    assert (keys_of(after) != keys_of(memory)).any()


def test_members_of_a_vmap_draw_each_for_themselves():
    """Also where they share all they have, memory and inputs."""

    def loss(probes, memory):
        members = jax.vmap(lambda probe: F(PARAMS | {"probe": probe}, X, memory=memory))
        return ((members(probes) - TARGET[None]) ** 2).sum()

    _, probes, after = jax.jit(msbp.value_and_grad(loss))(jnp.zeros((8, ROWS, 32)), MEMORY)
    seen = [tuple(np.flatnonzero(np.asarray(probe).any(axis=1))) for probe in probes]
    assert {len(rows) for rows in seen} == {ROWS // 2}
    assert len(set(seen)) == 8
    assert float(after["@outputs"].kept) == ROWS // 2


def test_an_ensemble_with_a_memory_for_each_member():
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), PROBED)
    memory = MEMORY | {"@outputs": jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), MEMORY["@outputs"])}
    memory["@outputs"] = memory["@outputs"]._replace(key=jax.random.split(jax.random.key(5), 4))
    grads = jax.vmap(lambda p, m: msbp.value_and_grad(loss_of(F))(p, m)[1])(params, memory)
    assert len({kept({"probe": probe}) for probe in grads["probe"]}) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:orbax")
def test_a_run_that_was_stopped_has_the_same_bits(tmp_path):
    f = msbp.sparse_vjp(network, {"@outputs": SAMPLE, "*": msbp.memorized(msbp.top_k(k=6), decay=0.8)})
    step, tx = jax.jit(msbp.value_and_grad(loss_of(f))), optax.sgd(0.1)

    def run(state, steps):
        for _ in range(steps):
            _, grads, memory = step(state["params"], state["memory"])
            updates, _ = tx.update(grads, tx.init(state["params"]))
            state = {"params": optax.apply_updates(state["params"], updates), "memory": memory}
        return state

    start = {"params": PARAMS, "memory": f.init_memory(PARAMS, X)}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.StandardSave(run(start, 2)))
        manager.wait_until_finished()
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(2, args=ocp.args.StandardRestore(like))
    assert_trees_equal(run(restored, 3), run(start, 5))


def test_loss_scaling_by_a_power_of_two_changes_nothing():
    scaling = msbp.DynamicScale(scale=1024.0)
    step = jax.jit(lambda d, p, m: d.value_and_grad(loss_of(F))(p, m))(scaling, PROBED, MEMORY)
    loss, grads, memory = jax.jit(msbp.value_and_grad(loss_of(F)))(PROBED, MEMORY)
    assert bool(step.finite)
    assert_trees_close((step.value, step.grads), (loss, grads), rtol=1e-6)
    assert_trees_close(step.memory["@outputs"].metrics, memory["@outputs"].metrics, rtol=1e-6)
    np.testing.assert_array_equal(keys_of(step.memory), keys_of(memory))


def test_a_step_that_overflows_leaves_the_memory():
    step = msbp.DynamicScale(scale=1024.0).value_and_grad(loss_of(F))(PROBED, MEMORY, X.at[3, 2].set(jnp.nan))
    assert not bool(step.finite)
    assert_trees_equal(step.memory, MEMORY)


class MLP(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(32)(nn.relu(nn.Dense(64)(x)))


def test_flax_s_own_train_state():
    """The memory among the parameters draws anew in each step, and counts what it kept."""
    model = msbp.sparse_vjp(MLP(), HALF)
    variables = model.init(jax.random.key(1), X)
    tx = optax.sgd(0.1)
    state = TrainState.create(apply_fn=model.apply, params=model.with_memory(variables, X), tx=tx)
    grad = jax.jit(jax.grad(lambda params: ((model.apply({"params": params}, X) - TARGET) ** 2).mean()))
    seen = []
    for _ in range(3):
        grads = grad(state.params)
        seen.append(np.asarray(grads["params"]["Dense_1"]["bias"]))
        state = state.apply_gradients(grads=grads)
    assert len({bias.tobytes() for bias in seen}) == 3
    told = state.params["_overwrite_with_gradient"]["msbp_memory"]["@outputs"]
    mean = {name: float(told[name]["total"] / told[name]["weight"]) for name in ("kept", "density")}
    assert mean == pytest.approx({"kept": ROWS // 2, "density": 0.5})


def test_the_ready_made_train_state():
    model = msbp.sparse_vjp(MLP(), SAMPLE)
    variables = model.init(jax.random.key(1), X)
    memory = model.init_memory(variables, X)

    def loss_fn(params, memory, batch):
        return ((model.apply({"params": params}, batch, memory=memory) - TARGET) ** 2).mean()

    state = msbp.TrainState.create(apply_fn=None, params=variables["params"], tx=optax.sgd(0.5), memory=memory)
    step, losses = msbp.train_step(loss_fn), []
    for _ in range(30):
        state, loss = step(state, X)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert 0.75 < float(msbp.metrics(state.memory)["@outputs/efficiency"]) < 0.85


class Transformer(nn.Module):
    """A block of attention and linear layers over sequences."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(5)(x + nn.Dense(8)(nn.relu(nn.Dense(64)(nn.LayerNorm()(x)))))


def test_attention_within_examples_leaves_examples_apart():
    """The draw is over axis 0: a sequence is left out whole, or weighed up whole."""
    x = jax.random.normal(jax.random.key(6), (8, 6, 8))
    model = msbp.sparse_vjp(Transformer(), msbp.sample_rows(count=4))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    memory = model.init_memory(variables, x)
    got = jax.jit(jax.grad(lambda x: jnp.sin(model.apply(variables, x, memory=memory)).sum()))(x)
    dense = jax.jit(jax.grad(lambda x: jnp.sin(Transformer().apply(variables, x)).sum()))(x)
    weight = (got * dense).sum(axis=(1, 2)) / (dense**2).sum(axis=(1, 2))
    assert np.count_nonzero(weight) == 4
    assert_trees_close(got, dense * weight[:, None, None], rtol=1e-4)


def test_metrics():
    assert set(msbp.metrics(MEMORY)) == {"@outputs/efficiency", "@outputs/density", "@outputs/count"}
    memory = msbp.value_and_grad(loss_of(F))(PROBED, MEMORY)[2]
    told = {name: float(value) for name, value in msbp.metrics(memory).items()}
    assert told["@outputs/density"] == 0.5
    assert told["@outputs/count"] == ROWS // 2
    assert 0.2 < told["@outputs/efficiency"] < 1


def test_metrics_of_a_draw_at_each_site():
    f = msbp.sparse_vjp(network, {"w": HALF, "v": msbp.split(dx=msbp.dense(), dw=HALF)})
    memory = msbp.value_and_grad(loss_of(f))(PARAMS, f.init_memory(PARAMS, X))[2]
    told = msbp.metrics(memory)
    assert float(told["w/density"]) == 0.5
    assert float(told["v/dw/density"]) == 0.5


def test_diagnose():
    """Cosine and share are those of the gradients themselves."""
    diagnosis = jax.jit(msbp.diagnose(loss_of(F)))(PARAMS, MEMORY)
    grads = jax.grad(lambda p: loss_of(F)(p, MEMORY))(PARAMS)
    dense = jax.grad(lambda p: ((network(p, X) - TARGET) ** 2).mean())(PARAMS)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, dense)]
    assert set(diagnosis.sites) == {"v", "w"}
    for site in diagnosis.sites.values():
        assert 0 < float(site.cosine) < 1
        assert float(site.density) == pytest.approx(0.5)
    assert 0 < float(diagnosis.cosine) < 1
    assert float(diagnosis.cosine) == pytest.approx(flat[0] @ flat[1] / np.prod(np.linalg.norm(flat, axis=1)), abs=0.25)


def test_no_second_compilation():
    step, memory = jax.jit(msbp.value_and_grad(loss_of(F))), MEMORY
    params = PROBED
    for _ in range(4):
        _, grads, memory = step(params, memory)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert step._cache_size() == 1


def test_the_report():
    f = msbp.sparse_vjp(network, msbp.sample_rows(efficiency=0.95))
    report = f.report(PARAMS, X)
    entering = "@outputs: sample_rows(efficiency=0.95), once, of the gradient where it enters, 16 rows of 32 entries."
    assert report.entering == entering
    assert {row.name: (row.sparsifier, row.keeps, row.skips) for row in report.sparse} == dict.fromkeys(
        ("w", "v"), ("skip_zero_rows()", "rows that are not 0", "rows")
    )
    kernel = "native" if "native" in msbp.backends()["grad_input"] else "xla"
    assert {row.backend for row in report.sparse} == {f"{kernel}, below 75% of the rows"}
    text = " ".join(str(report).split())  # it is broken into lines there
    assert entering in text
    assert "by rows" in text
    assert "By rows: what is saved is the share of the rows that are left out" in text
    assert report.dense == ()


def test_the_report_of_a_draw_that_saves_nothing():
    plan = {"@outputs": msbp.sample_rows(efficiency=0.95), "*": msbp.dense()}
    report = msbp.sparse_vjp(network, plan).report(PARAMS, X)
    assert report.entering.endswith("No site is sparse: its noise is paid for, and nothing is saved.")


def test_outputs_of_one_example_are_rows_of_their_own():
    """What the README says of a vmap over examples: `[n]` of each are n rows, drawn by the entry."""
    f = msbp.sparse_vjp(lambda p, x: network(p, x[None])[0], HALF)
    memory = f.init_memory(PARAMS, X[0])
    n = f(PARAMS, X[0], memory=memory).shape[0]
    assert f.report(PARAMS, X[0]).entering.endswith(f"{n} rows of 1 entries.")


def test_the_report_of_a_density_that_is_known():
    report = msbp.sparse_vjp(network, {"*": HALF}).report(PARAMS, X)
    assert {(row.keeps, row.saved, row.skips) for row in report.sparse} == {("0.5 of the rows", 0.5, "")}
    assert report.entering == ""
