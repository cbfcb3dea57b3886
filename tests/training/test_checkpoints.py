"""Orbax: a run that was stopped goes on with the same bits, on the same mesh or another, with its memory or without."""

import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

S = msbp.memorized(msbp.random_k(k=6, rows_per_group=2), decay=0.8)
TX = optax.sgd(0.1, momentum=0.9)
X = jax.random.normal(jax.random.key(2), (8, 16))
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Orbax's own
    pytest.mark.filterwarnings("ignore::UserWarning:orbax"),
]


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])


F = msbp.sparse_vjp(network, S)


def start(width=64):
    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (16, width)) / 4, "v": jax.random.normal(keys[1], (width, 64)) / 8}
    return {"params": params, "opt_state": TX.init(params), "memory": F.init_memory(params, X)}


@jax.jit
def step(state, x):
    loss = lambda p, m: (F(p, x, memory=m) ** 2).mean()
    _, grads, memory = msbp.value_and_grad(loss)(state["params"], state["memory"])
    updates, opt_state = TX.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state, "memory": memory}


def run(state, first, last):
    for i in range(first, last):
        state = step(state, X + i)
    return state


def saved(manager, number, state):
    train = {name: state[name] for name in ("params", "opt_state")}
    items = ocp.args.Composite(train=ocp.args.StandardSave(train), memory=ocp.args.StandardSave(state["memory"]))
    manager.save(number, args=items)
    manager.wait_until_finished()


def restored(manager, number, like, *names):
    """Restore what `names` names; `like` says shapes, dtypes and where it is to lie."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    wanted = {"train": {name: abstract[name] for name in ("params", "opt_state")}, "memory": abstract["memory"]}
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(wanted[name]) for name in names})
    return manager.restore(number, args=args)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_has_the_same_bits(tmp_path, stop):
    straight = run(start(), 0, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        saved(manager, stop, run(start(), 0, stop))
    with ocp.CheckpointManager(tmp_path) as manager:
        items = restored(manager, manager.latest_step(), start(), "train", "memory")
    assert_trees_equal(run({**items.train, "memory": items.memory}, stop, 5), straight)


def test_a_run_may_go_on_without_its_memory(tmp_path):
    before = run(start(), 0, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        saved(manager, 2, before)
        train = restored(manager, 2, start(), "train").train
    got = run({**train, "memory": start()["memory"]}, 2, 4)
    assert_trees_equal(got, run({**before, "memory": start()["memory"]}, 2, 4))


def placed(state, devices, memory_spec):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = NamedSharding(mesh, memory_spec)
    return {name: jax.device_put(tree, sharded if name == "memory" else whole) for name, tree in state.items()}


def test_another_mesh(tmp_path):
    """Saved from 8 devices with a memory cut up over them, restored to 2."""
    top = msbp.memorized(msbp.top_k(k=6, rows_per_group=1), decay=0.8)
    f = msbp.sparse_vjp(network, top)
    state = start() | {"memory": f.init_memory(start()["params"], X)}
    loss = lambda p, m, x: (f(p, x, memory=m) ** 2).mean()
    gradients = jax.jit(msbp.value_and_grad(loss))
    memory = gradients(state["params"], state["memory"], X)[2]
    cut = placed({**state, "memory": memory}, 8, PartitionSpec("data"))
    with ocp.CheckpointManager(tmp_path) as manager:
        saved(manager, 0, cut)
        there = placed(state, 2, PartitionSpec("data"))
        items = restored(manager, 0, there, "train", "memory")
    assert len(items.memory["w"].residual.sharding.device_set) == 2
    assert_trees_equal(items.memory, memory)
    x = jax.device_put(X, items.memory["w"].residual.sharding)
    assert_trees_close(gradients(items.train["params"], items.memory, x), gradients(state["params"], memory, X))


def test_a_memory_of_something_else_is_refused_with_the_difference(tmp_path):
    state = start()
    with ocp.CheckpointManager(tmp_path) as manager:
        saved(manager, 0, state)
        memory = manager.restore(0, args=ocp.args.Composite(memory=ocp.args.StandardRestore())).memory
        other = msbp.sparse_vjp(network, msbp.memorized(msbp.top_k(k=6), decay=0.8))
        like = start() | {"memory": other.init_memory(state["params"], X)}
        with pytest.raises(ValueError, match=r"(?s)tree structures do not match:.*w.inner"):
            restored(manager, 0, like, "memory")
        # Without a target, Orbax gives plain containers: the call says what it expected instead.
        with pytest.raises(
            ValueError, match=r"memory of w, v is a dict of the fields of MemorizedState, .* without a target"
        ):
            F(state["params"], X, memory=memory)
        wide = start(width=80)
        good = restored(manager, 0, state, "memory").memory
        with pytest.raises(ValueError, match=r"(?s)site w has shape \(64,\).*expected \(80,\)"):
            F(wide["params"], X, memory=good)
    slot = msbp.sparse_vjp(network, msbp.memorized(msbp.top_k(k=6), decay=0.8, reduce="slot"))
    with pytest.raises(ValueError, match=r"(?s)shape \(4, 64\).*expected \(8, 64\).*site v has shape \(4, 64\)"):
        slot(state["params"], X, memory=slot.init_memory(state["params"], X[:4]))


def test_nnx(tmp_path):
    def make():
        rngs = nnx.Rngs(0, dropout=1)
        layers = nnx.Linear(16, 64, rngs=rngs), nnx.Dropout(0.2, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
        model = msbp.sparse_vjp(nnx.Sequential(*layers), S)
        model.init_memory(X)
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, x):
        _, grads = msbp.nnx.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)
        optimizer.update(model, grads)

    model, optimizer = make()
    with ocp.CheckpointManager(tmp_path) as manager:
        for i in range(4):
            if i == 2:
                _, memory, rest = nnx.split((model, optimizer), msbp.Memory, ...)
                items = {"memory": ocp.args.StandardSave(memory), "train": ocp.args.StandardSave(rest)}
                manager.save(0, args=ocp.args.Composite(**items))
                manager.wait_until_finished()
            train(model, optimizer, X + i)
        again = make()
        graphdef, memory, rest = nnx.split(again, msbp.Memory, ...)
        like = {"memory": ocp.args.StandardRestore(memory), "train": ocp.args.StandardRestore(rest)}
        back = manager.restore(0, args=ocp.args.Composite(**like))
    model_again, optimizer_again = nnx.merge(graphdef, back.memory, back.train)
    for i in range(2, 4):
        train(model_again, optimizer_again, X + i)
    assert_trees_equal(jax.tree.leaves(nnx.state(model_again)), jax.tree.leaves(nnx.state(model)))


KILLED = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp, orbax.checkpoint as ocp, msbp_jax as msbp
f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=6), decay=0.8, reduce="slot"))
w, x = jnp.ones((16, 2048)), jnp.ones((4096, 16))
memory = f.init_memory(w, x)
with ocp.CheckpointManager(sys.argv[1]) as manager:
    manager.save(0, args=ocp.args.StandardSave(memory))
    manager.wait_until_finished()
    manager.save(1, args=ocp.args.StandardSave(jax.tree.map(lambda leaf: leaf + 1, memory)))
    while not any("tmp" in name for name in os.listdir(sys.argv[1])):
        time.sleep(1e-4)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving_the_last_good_checkpoint_is_used(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any("tmp" in path.name for path in tmp_path.iterdir())  # what was being written
    f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=6), decay=0.8, reduce="slot"))
    w, x = jnp.ones((16, 2048)), jnp.ones((4096, 16))
    memory = f.init_memory(w, x)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 0
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, memory)
        back = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    assert_trees_equal(back, memory)
    assert f(w, x, memory=back).shape == (4096, 2048)
