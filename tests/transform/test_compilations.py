"""What compiles, compiles once: also where a step is not inside a `jax.jit` of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import msbp_jax as msbp
from msbp_jax.testing import random_gradient

N = 64
S = msbp.memorized(msbp.top_k(k=7, rows_per_group=2), 0.5)
R = msbp.memorized(msbp.random_k(k=7), 0.5)
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"in": jax.random.normal(KEYS[0], (6, N)) / 3, "stack": jax.random.normal(KEYS[1], (3, N, N)) / 8}


@pytest.fixture
def compilations():
    """A list that grows by one for every program that XLA compiles."""
    seen = []
    listen = lambda name, duration, **details: seen.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert seen, "JAX does not tell of compilations by this name, and nothing would be counted"
    seen.clear()
    yield seen
    jax.monitoring.clear_event_listeners()


def after_two_steps(compilations, step, *carry):
    """Return how often a step that hands on its results compiles after the second, and the last results."""
    for number in range(5):
        if number == 2:
            del compilations[:]
        carry = step(*carry, random_gradient(number, 4, 6))
    jax.block_until_ready(carry)
    return len(compilations), carry


@jax.jit
def layer(w, x):
    return jnp.tanh(x @ w)


@jax.jit
def deep_layer(w, x):
    return layer(w, layer(w, x))


def tanh_layer(h, w):
    return jnp.tanh(h @ w), None


def jit_layer(h, w):
    return layer(w, h), None


def product(w, x):
    return x @ w


def twice(w, x):
    return x @ w * 2


MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
REMATERIALIZED = jax.checkpoint(product)
MAPPED = jax.shard_map(product, mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d"))


def jitted_layers(p, x):
    return deep_layer(p["stack"][0], layer(p["in"], x))


def scanned(p, x):
    return lax.scan(tanh_layer, x @ p["in"], p["stack"])[0]


def scanned_jits(p, x):
    return lax.scan(jit_layer, layer(p["in"], x), p["stack"])[0]


def branched(p, x):
    return lax.cond(x[0, 0] > 0, layer, product, p["in"], x)


def rematerialized(p, x):
    return REMATERIALIZED(p["in"], x)


def mapped(p, x):
    return MAPPED(p["in"], x)


def vmapped(p, x):
    return jax.vmap(layer, (None, 0))(p["in"], x[:, None])[:, 0]


PROGRAMS = [jitted_layers, scanned, scanned_jits, branched, rematerialized, mapped, vmapped]


@pytest.mark.slow
@pytest.mark.parametrize("sparsifier", [S, R], ids=["top_k", "random_k"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_an_eager_step(program, sparsifier, compilations):
    f = msbp.sparse_vjp(program, sparsifier)

    def plain(x):
        jax.value_and_grad(lambda p: (program(p, x) ** 2).mean())(PARAMS)
        return ()

    def step(memory, x):
        _, _, memory = msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean())(PARAMS, memory, x)
        return (memory,)

    by_us, _ = after_two_steps(compilations, step, f.init_memory(PARAMS, jnp.ones((4, 6))))
    # JAX compiles a shard_map anew at every step.
    assert by_us <= (after_two_steps(compilations, plain)[0] if program is mapped else 0)


@pytest.mark.parametrize("options", [{}, {"has_aux": True}], ids=str)
def test_a_jit_around_the_model_alone(options, compilations):
    model = msbp.sparse_vjp(nn.Sequential([nn.Dense(N), nn.relu, nn.Dense(N)]), S)
    variables = model.init(jax.random.key(0), jnp.ones((4, 6)))
    traces = []

    @jax.jit
    def apply(variables, memory, x):
        traces.append(1)
        return model.apply(variables, x, memory=memory)

    def loss(variables, memory, x):
        value = (apply(variables, memory, x) ** 2).mean()
        return (value, {"twice": 2 * value}) if "has_aux" in options else value

    step = msbp.value_and_grad(loss, **options)

    def train(variables, memory, x):
        _, grads, memory = step(variables, memory, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, variables, grads), memory

    memory = model.init_memory(variables, jnp.ones((4, 6)))
    compiled, (_, after) = after_two_steps(compilations, train, variables, memory)
    assert compiled == 0
    # One trace for each kind of input that JAX itself tells apart, not one a step.
    assert len(traces) <= 2
    assert any(np.any(leaf) for leaf in jax.tree.leaves(after))


def test_a_jit_around_the_whole_step_traces_once(compilations):
    f, traces = msbp.sparse_vjp(jitted_layers, R), []

    @jax.jit
    def step(memory, x):
        traces.append(1)
        return (msbp.value_and_grad(lambda p, m: (f(p, x, memory=m) ** 2).mean())(PARAMS, memory)[2],)

    assert after_two_steps(compilations, step, f.init_memory(PARAMS, jnp.ones((4, 6))))[0] == 0
    assert len(traces) == 1


@pytest.mark.parametrize("around", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_an_nnx_step(around, compilations):
    model = msbp.sparse_vjp(nnx.Linear(6, N, rngs=nnx.Rngs(0)), S)
    model.init_memory(jnp.ones((4, 6)))
    gradient = around(lambda model, x: msbp.nnx.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x))

    def step(x):
        gradient(model, x)
        return ()

    assert after_two_steps(compilations, step)[0] == 0


def test_a_jit_around_diagnose(compilations):
    f = msbp.sparse_vjp(scanned, S)
    diagnose = jax.jit(msbp.diagnose(lambda p, m, x: (f(p, x, memory=m) ** 2).mean()))
    memory = f.init_memory(PARAMS, jnp.ones((4, 6)))

    def step(x):
        diagnose(PARAMS, memory, x)
        return ()

    assert after_two_steps(compilations, step)[0] == 0


def test_a_checkpoint_that_is_a_new_function_at_every_step(compilations):
    f = msbp.sparse_vjp(lambda p, x: jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, p["in"]), S)
    params = {"in": PARAMS["in"]}
    step = msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean())

    def hand_on(memory, x):
        return (step(params, memory, x)[2],)

    count, (memory,) = after_two_steps(compilations, hand_on, f.init_memory(params, jnp.ones((4, 6))))
    assert count == 0
    assert memory["in"].residual.any()
