"""What a memory tells of itself, as scalars by name, and what a diagnosis does."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

X = jax.random.normal(jax.random.key(2), (8, 8))
S = msbp.memorized(msbp.top_k(k=6, rows_per_group=2), decay=0.8)


class MLP(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(x))
        return x


def setup(sparsifier=S):
    model = msbp.sparse_vjp(MLP(), sparsifier)
    variables = model.init(jax.random.key(0), X)
    loss_fn = lambda params, memory, x: (model.apply({"params": params}, x, memory=memory) ** 2).mean()
    return loss_fn, variables["params"], model.init_memory(variables, X)


def trained(sparsifier=S):
    """Return a memory after a step, which is not 0."""
    loss_fn, params, memory = setup(sparsifier)
    return msbp.value_and_grad(loss_fn)(params, memory, X)[2]


@pytest.mark.parametrize("reduce", ["mean", "slot"])
def test_the_norm_of_each_site_s_memory(reduce):
    memory = trained(msbp.memorized(msbp.random_k(k=6), decay=0.8, reduce=reduce))
    got = msbp.metrics(memory)
    assert list(got) == ["Dense_0/kernel/memory_norm", "Dense_1/kernel/memory_norm"]
    for name, value in got.items():
        want = np.linalg.norm(np.asarray(memory[name.removesuffix("/memory_norm")].residual, np.float64))
        assert want > 0
        assert isinstance(value, jax.Array)
        assert (value.shape, value.dtype) == ((), jnp.float32)
        np.testing.assert_allclose(value, want, rtol=1e-6)


def test_under_jit_and_without_arrays():
    memory = trained()
    assert_trees_close(jax.jit(msbp.metrics)(memory), msbp.metrics(memory))
    shapes = jax.eval_shape(msbp.metrics, jax.eval_shape(lambda: memory))
    assert {value.shape for value in shapes.values()} == {()}


def test_stacked_layers_have_one_norm():
    ws = jax.random.normal(jax.random.key(0), (3, 64, 64)) / 8
    x = jnp.ones((4, 64))
    f = msbp.sparse_vjp(lambda ws, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0], S)
    loss_fn = lambda ws, m, x: (f(ws, x, memory=m) ** 2).mean()
    memory = msbp.value_and_grad(loss_fn)(ws, f.init_memory(ws, x), x)[2]
    assert memory["params"].residual.shape == (3, 64)
    each = jnp.linalg.norm(memory["params"].residual, axis=1)
    assert float(each.min()) > 0
    np.testing.assert_allclose(msbp.metrics(memory)["params/memory_norm"], jnp.linalg.norm(each), rtol=1e-6)


def test_several_memories_are_told_apart_by_their_paths():
    memory = trained()
    norm = msbp.metrics(memory)["Dense_0/kernel/memory_norm"]
    got = msbp.metrics({"actor": memory, "critics": [memory, jax.tree.map(lambda a: 2 * a, memory)]})
    assert len(got) == 6
    assert_trees_equal(got["actor/Dense_0/kernel/memory_norm"], norm)
    assert_trees_equal(got["critics/1/Dense_0/kernel/memory_norm"], 2 * norm)
    assert_trees_equal(msbp.metrics(memory["Dense_0/kernel"]), {"memory_norm": norm})


def test_paths_that_read_alike_do_not_hide_one_another():
    one, two = (msbp.MemorizedState(jnp.full(4, fill), ()) for fill in (1.0, 2.0))
    got = msbp.metrics({"a": {"b/c": one}, "a/b": {"c": two}})
    assert {name: float(value) for name, value in got.items()} == {
        "a/b/c/memory_norm": 2.0,
        "a/b/c#2/memory_norm": 4.0,
    }


def test_of_a_train_state():
    loss_fn, params, memory = setup()
    state = msbp.TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9), memory=memory)
    state, _ = msbp.train_step(loss_fn)(state, X)
    got = msbp.metrics(state.memory)
    assert list(got) == ["Dense_0/kernel/memory_norm", "Dense_1/kernel/memory_norm"]
    assert all(value > 0 for value in got.values())
    assert_trees_equal(msbp.metrics(state), {f"memory/{name}": value for name, value in got.items()})


def test_within_a_loss_it_reads_the_memory_that_came_in():
    loss_fn, params, _ = setup()
    before = trained()
    both = lambda params, memory, x: (loss_fn(params, memory, x), msbp.metrics(memory))
    (_, got), _, after = msbp.value_and_grad(both, has_aux=True)(params, before, X)
    assert_trees_equal(got, msbp.metrics(before))
    assert_trees_equal(after, msbp.value_and_grad(loss_fn)(params, before, X)[2])


@pytest.mark.parametrize("sparsifier", [msbp.top_k(k=6), msbp.random_k(k=6)])
def test_states_with_nothing_to_tell(sparsifier):
    assert msbp.metrics(trained(sparsifier)) == {}
    assert msbp.metrics({}) == {}


class Counted(NamedTuple):
    """How many columns were kept so far, told by a property."""

    kept: jax.Array

    @property
    def metrics(self):
        return {"kept": self.kept.sum(), "layers": self.kept.size}


class Told(NamedTuple):
    """The same by a method, with metrics of another choosing."""

    kept: jax.Array
    what: str = "sum"

    def metrics(self):
        return {"kept": self.kept} if self.what == "array" else [1.0] if self.what == "list" else {"kept": "many"}


def counting(k):
    """Keeps the first k features, and counts."""

    def apply(u, state):
        columns = msbp.take_columns(u, jnp.arange(k, dtype=jnp.int32)[None], rows_per_group=None)
        return columns, Counted(state.kept + k)

    return msbp.Sparsifier(init=lambda aval: Counted(jnp.zeros((), jnp.float32)), apply=apply, name="counting")


def test_a_state_adds_its_own():
    assert {name: float(value) for name, value in msbp.metrics(trained(counting(5))).items()} == {
        "Dense_0/kernel/kept": 5.0,
        "Dense_0/kernel/layers": 1.0,
        "Dense_1/kernel/kept": 5.0,
        "Dense_1/kernel/layers": 1.0,
    }
    memory = trained(msbp.memorized(counting(5), decay=0.8))
    got = msbp.metrics(memory)
    assert list(got) == [f"Dense_{i}/kernel/{what}" for i in (0, 1) for what in ("memory_norm", "kept", "layers")]
    assert float(got["Dense_0/kernel/kept"]) == 5.0
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), memory, memory)
    assert float(msbp.metrics(stacked)["Dense_0/kernel/kept"]) == 10.0


class Wrapper(NamedTuple):
    """A state around another, which has its name from where it stands."""

    step: jax.Array
    inner: Any


def test_what_is_wrapped_has_the_name_of_its_site():
    norm = {"w/memory_norm": 2.0}
    memorized = msbp.MemorizedState(jnp.ones(4), ())
    as_floats = lambda found: {name: float(value) for name, value in found.items()}
    assert as_floats(msbp.metrics({"w": Wrapper(jnp.zeros(()), memorized)})) == norm
    twice = msbp.MemorizedState(jnp.ones(4), Wrapper(jnp.zeros(()), memorized))
    assert as_floats(msbp.metrics({"w": twice})) == norm | {"w/memory_norm#2": 2.0}
    scheduled = msbp.memorized(msbp.top_k(k=6), decay=lambda step: 0.5 + 0.0 * step)
    assert list(msbp.metrics(trained(scheduled))) == ["Dense_0/kernel/memory_norm", "Dense_1/kernel/memory_norm"]


def test_what_is_within_a_state_of_several_parts():
    state = msbp.MemorizedState(jnp.ones(4), (Counted(jnp.float32(3)), {"second": Counted(jnp.float32(4))}))
    assert list(msbp.metrics({"w": state})) == [
        "w/memory_norm",
        "w/0/kept",
        "w/0/layers",
        "w/1/second/kept",
        "w/1/second/layers",
    ]


def test_a_field_of_that_name_is_data():
    class Carry(NamedTuple):
        memory: dict
        metrics: dict

    assert list(msbp.metrics(Carry({"w": msbp.MemorizedState(jnp.ones(4), ())}, {"loss": 1.0}))) == [
        "memory/w/memory_norm"
    ]


class Net(nnx.Module):
    """Two wrapped parts, one of them in two places, and a way back to the whole."""

    def __init__(self, rngs):
        self.encoder = msbp.sparse_vjp(nnx.Linear(8, 64, rngs=rngs), S)
        self.layers = nnx.List([msbp.sparse_vjp(nnx.Linear(64, 64, rngs=rngs), S)])
        self.again = self.layers[0]

    def __call__(self, x):
        return self.again(nnx.relu(self.encoder(x)))


def test_nnx_models():
    net = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Net holds no model with a memory\. .* call model\.init_memory"):
        msbp.nnx.metrics(net)
    net.encoder.init_memory(X)
    net.again.init_memory(jnp.ones((8, 64)))
    msbp.nnx.value_and_grad(lambda net, x: (net(x) ** 2).mean())(net, X)
    got = msbp.nnx.metrics(net)
    assert set(got) == {"again/kernel/memory_norm", "encoder/kernel/memory_norm"}
    for part in (net.encoder, net.again):
        own = msbp.nnx.metrics(part)
        assert list(own) == ["kernel/memory_norm"]
        want = jnp.linalg.norm(part.memory["kernel"].get_value().residual)
        assert want > 0
        np.testing.assert_allclose(own["kernel/memory_norm"], want, rtol=1e-6)
    assert_trees_equal(msbp.metrics(nnx.state(net)), got)
    assert_trees_equal(msbp.metrics(nnx.state(net, msbp.Memory)), got)
    assert_trees_close(nnx.jit(msbp.nnx.metrics)(net), got)
    loss_fn = lambda net, x: ((net(x) ** 2).mean(), msbp.nnx.metrics(net))
    (_, within), _ = msbp.nnx.value_and_grad(loss_fn, has_aux=True)(net, X)
    assert_trees_equal(within, got)
    net.itself = net
    assert set(msbp.nnx.metrics(net)) == set(got)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "takes a memory, as init_memory .* got NoneType, which holds no state"),
        (3.0, "got float, which holds no state"),
        ("memory", "got str, which holds no state"),
        (jnp.ones(3), "got ArrayImpl, which holds no state"),
        ({"params": {"Dense_0": {"kernel": jnp.ones((3, 4))}}}, "got dict, which holds no state"),
        ({"w": {"residual": jnp.ones(4), "inner": ()}}, "from a checkpoint is to be restored with a target"),
        (msbp.sparse_vjp(MLP(), S), "got SparseModule, a wrapped model, whose memory is apart from it"),
        (msbp.sparse_vjp(lambda w, x: x @ w, S), "got SparseFunction, a wrapped model"),
        (Net(nnx.Rngs(0)), r"got Net, an NNX model\. Use msbp\.nnx\.metrics"),
        (
            {"w": Told(jnp.ones(3), "array")},
            r"Told\.metrics\['kept'\] must be a real scalar, got shape \(3,\) and dtype",
        ),
        ({"w": Told(jnp.ones(3), "list")}, r"Told\.metrics must give a dict of scalars by name, got \[1\.0\]"),
        ({"w": Told(jnp.ones(3))}, r"Told\.metrics\['kept'\] must be a real scalar, got 'many'"),
    ],
)
def test_what_is_no_memory(bad, message):
    with pytest.raises(TypeError, match=message):
        msbp.metrics(bad)


@pytest.mark.parametrize("bad", [{}, {"w": msbp.MemorizedState(jnp.ones(4), ())}, 3])
def test_what_is_no_nnx_model(bad):
    with pytest.raises(
        TypeError, match=rf"takes an NNX model .* got {type(bad).__name__}\. .* msbp\.metrics\(memory\)"
    ):
        msbp.nnx.metrics(bad)


def diagnosed():
    loss_fn, params, memory = setup()
    return jax.jit(msbp.diagnose(loss_fn))(params, memory, X)


def test_a_diagnosis_as_a_flat_dict():
    diagnosis = diagnosed()
    got = diagnosis.to_dict()
    fields = ("cosine", "density", "memory_norm")
    assert set(got) == {"cosine", *(f"Dense_{i}/kernel/{field}" for i in (0, 1) for field in fields)}
    assert got["cosine"] is diagnosis.cosine
    assert got["Dense_1/kernel/density"] is diagnosis.sites["Dense_1/kernel"].density
    after = msbp.metrics(trained())
    assert_trees_close({name: value for name, value in got.items() if name in after}, after)
    loss_fn, params, memory = setup()
    flat = jax.jit(lambda *arguments: msbp.diagnose(loss_fn)(*arguments).to_dict())(params, memory, X)
    assert_trees_equal(flat, got)


def test_a_diagnosis_as_a_table():
    diagnosis = diagnosed()
    assert jax.tree.structure(jax.tree.map(lambda a: a, diagnosis)) == jax.tree.structure(diagnosis)
    lines = str(diagnosis).splitlines()
    assert lines[0].strip() == "Sparse against true gradients"
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    assert ["site", "cosine", "density", "memory norm"] in cells
    for name, site in diagnosis.sites.items():
        assert [name, *(f"{float(value):.4g}" for value in site)] in cells
    assert ["all parameters", f"{float(diagnosis.cosine):.4g}", "", ""] in cells


def test_a_diagnosis_without_numbers_can_be_printed():
    """While it is traced, and of several at once."""
    loss_fn, params, memory = setup()
    seen = []
    jax.jit(lambda *arguments: seen.append(str(msbp.diagnose(loss_fn)(*arguments))))(params, memory, X)
    assert "float32[]" in seen[0]
    several = jax.vmap(lambda x: msbp.diagnose(loss_fn)(params, memory, x))(jnp.stack([X, X]))
    assert "float32[2]" in str(several)
