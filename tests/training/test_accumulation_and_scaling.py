"""Microbatches, loss scaling, frozen weights and whatever else Optax does with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp
from msbp_jax import kernels

S = msbp.memorized(msbp.top_k(k=6, rows_per_group=2), decay=0.8)
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"w": jax.random.normal(KEYS[0], (8, 64)) / 3, "v": jax.random.normal(KEYS[1], (64, 64)) / 8}
X = jax.random.normal(KEYS[2], (12, 8))


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])


F = msbp.sparse_vjp(network, S)
MEMORY = F.init_memory(PARAMS, X)


def loss_fn(p, m, x):
    return (F(p, x, memory=m) ** 2).mean()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.leaks
def test_microbatches_are_a_loop_over_slices(count):
    def with_aux(p, m, batch, *, scale):
        loss = loss_fn(p, m, batch["x"]) * scale
        return loss, {"rows": jnp.array(batch["x"].shape[0]), "draw": jax.random.normal(batch["key"])}

    batch = {"x": X, "key": jax.random.key(5)}
    step = jax.jit(msbp.value_and_grad(with_aux, has_aux=True, microbatches=count))
    (loss, aux), grads, memory = step(PARAMS, MEMORY, batch, scale=jnp.array(2.0))
    want_memory, losses, gradients = MEMORY, [], []
    for i, key in enumerate(jax.random.split(batch["key"], count)):
        part = {"x": X[i * 12 // count : (i + 1) * 12 // count], "key": key}
        (one, one_aux), g, want_memory = msbp.value_and_grad(with_aux, has_aux=True)(
            PARAMS, want_memory, part, scale=jnp.array(2.0)
        )
        losses.append(one)
        gradients.append(g)
        assert_trees_equal(jax.tree.map(lambda a, i=i: a[i], aux), one_aux)
    assert_trees_close(loss, jnp.stack(losses).mean())
    assert_trees_close(grads, jax.tree.map(lambda *g: sum(g) / count, *gradients))
    assert_trees_close(memory, want_memory)


def test_bad_microbatches():
    with pytest.raises(ValueError, match=r"microbatches must be at least 1 \(equal parts .*got 0"):
        msbp.value_and_grad(loss_fn, microbatches=0)
    with pytest.raises(ValueError, match=r"microbatches=5 cuts each array .* argument 0 has shape \(12, 8\)\. Choose"):
        msbp.value_and_grad(loss_fn, microbatches=5)(PARAMS, MEMORY, X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", ["float32", "half"])
def test_half_precision(dtype, param_dtype):
    """Float32 parameters cast to half for the products, or half all through: the memory is float32 either way."""
    s = msbp.memorized(msbp.top_k(k=32, rows_per_group=2), decay=0.8)
    params = PARAMS if param_dtype == "float32" else jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    half = msbp.sparse_vjp(lambda p, x: network(jax.tree.map(lambda w: w.astype(dtype), p), x.astype(dtype)), s)
    full = msbp.sparse_vjp(network, s)
    found = []
    for f, p in ((half, params), (full, PARAMS)):
        loss = lambda p, m, x, f=f: (f(p, x, memory=m).astype(jnp.float32) ** 2).mean()
        step = jax.jit(msbp.value_and_grad(loss))
        memory = step(p, f.init_memory(p, X), X)[2]
        _, grads, memory = step(p, memory, X)
        assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda w: w.dtype, p)
        assert {leaf.dtype for leaf in jax.tree.leaves(memory)} == {jnp.dtype(jnp.float32)}
        found.append(jnp.concatenate([g.astype(jnp.float32).ravel() for g in jax.tree.leaves(grads)]))
    cosine = jnp.vdot(*found) / (jnp.linalg.norm(found[0]) * jnp.linalg.norm(found[1]))
    assert cosine > 0.97  # other roundings, so a few other choices: the same gradient


def test_mixed_parameter_dtypes_and_float64():
    with jax.enable_x64(True):
        params = {"w": PARAMS["w"].astype(jnp.bfloat16), "v": PARAMS["v"].astype(jnp.float64)}
        cast = lambda p, x: network({"w": p["w"].astype(jnp.float64), "v": p["v"]}, x)
        f = msbp.sparse_vjp(cast, S)
        x = X.astype(jnp.float64)
        memory = f.init_memory(params, x)
        step = jax.jit(msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean()))
        _, grads, memory = step(params, memory, x)
        _, _, memory = step(params, memory, x)
        assert (grads["w"].dtype, grads["v"].dtype) == (jnp.bfloat16, jnp.float64)
        assert {leaf.dtype for leaf in jax.tree.leaves(memory)} == {jnp.dtype(jnp.float32)}


def scaled_step(scale, params, memory, x, grow=2000):
    scaling = msbp.DynamicScale(scale=scale, growth_interval=grow)
    return jax.jit(lambda d, p, m, x: d.value_and_grad(loss_fn)(p, m, x))(scaling, params, memory, x)


@pytest.mark.leaks
def test_loss_scaling_by_a_power_of_two_changes_nothing():
    memory = msbp.value_and_grad(loss_fn)(PARAMS, MEMORY, X)[2]
    loss, grads, after = jax.jit(msbp.value_and_grad(loss_fn))(PARAMS, memory, X)
    step = scaled_step(1024.0, PARAMS, memory, X)
    assert bool(step.finite)
    assert_trees_close((step.value, step.grads, step.memory), (loss, grads, after), rtol=1e-6)
    has_aux = msbp.DynamicScale(scale=8.0).value_and_grad(lambda p, m, x: (loss_fn(p, m, x), 3), has_aux=True)
    assert has_aux(PARAMS, memory, X).value[1] == 3
    parts = msbp.DynamicScale(scale=8.0).value_and_grad(loss_fn, microbatches=3)(PARAMS, memory, X)
    assert_trees_close(parts[2:], msbp.value_and_grad(loss_fn, microbatches=3)(PARAMS, memory, X), rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_step_that_overflows_leaves_parameters_and_memory_alone(bad):
    memory = msbp.value_and_grad(loss_fn)(PARAMS, MEMORY, X)[2]
    tx = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=10)
    opt_state = tx.init(PARAMS)
    step = scaled_step(1024.0, PARAMS, memory, X.at[3, 2].set(bad))
    assert not bool(step.finite)
    assert_trees_equal(step.memory, memory)
    updates, _ = tx.update(step.grads, opt_state, PARAMS)
    assert_trees_equal(optax.apply_updates(PARAMS, updates), PARAMS)
    assert float(step.dynamic_scale.scale) == 512.0
    assert int(step.dynamic_scale.fin_steps) == 0
    again = scaled_step(512.0, PARAMS, step.memory, X)
    want = msbp.value_and_grad(loss_fn)(PARAMS, memory, X)
    assert_trees_close((again.value, again.grads, again.memory), want, rtol=1e-6)


def test_the_scale_grows_after_finite_steps():
    step = scaled_step(4.0, PARAMS, MEMORY, X, grow=0)
    assert float(step.dynamic_scale.scale) == 8.0
    assert int(scaled_step(4.0, PARAMS, MEMORY, X).dynamic_scale.fin_steps) == 1


def native_products(function, *args):
    return jax.jit(function).lower(*args).compile().as_text().count('custom_call_target="msbp_grad_weight"')


@pytest.mark.skipif("native" not in kernels.backends()["select"], reason="the native kernels were not built")
@pytest.mark.parametrize("freezing", ["partition", "masked", "stop_gradient", "argument"])
def test_the_gradient_of_a_frozen_weight_is_not_computed(freezing):
    f = msbp.sparse_vjp(network, S, backend="native")
    loss = lambda p, m, x: (f(p, x, memory=m) ** 2).mean()
    frozen = {"w": "frozen", "v": "trained"}
    tx = {
        "partition": optax.partition({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, frozen),
        "masked": optax.chain(optax.masked(optax.set_to_zero(), {"w": True, "v": False}), optax.sgd(0.1)),
    }.get(freezing, optax.sgd(0.1))

    def step(params, memory, x):
        if freezing == "argument":
            own = lambda v, m, x: loss({"w": params["w"], "v": v}, m, x)
            _, grads, memory = msbp.value_and_grad(own)(params["v"], memory, x)
            return params["v"] - 0.1 * grads, memory
        stopped = lambda p, m, x: loss({"w": jax.lax.stop_gradient(p["w"]), "v": p["v"]}, m, x)
        chosen = stopped if freezing == "stop_gradient" else loss
        _, grads, memory = msbp.value_and_grad(chosen)(params, memory, x)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)["v"], memory

    memory = f.init_memory(PARAMS, X)
    assert native_products(step, PARAMS, memory, X) == 1
    assert native_products(msbp.value_and_grad(loss), PARAMS, memory, X) == 2
    _, after = jax.jit(step)(PARAMS, memory, X)
    # The rule of a site whose operands are both constant does not run: its memory stays.
    reached = freezing in ("partition", "masked")
    assert bool(np.abs(after["w"].residual).sum() > 0) == reached


@pytest.mark.leaks
def test_a_frozen_layer_below_a_trained_one_still_remembers():
    """Its dw is not needed, its dx is: the selection runs, and the memory with it."""
    loss = lambda p, m, x: loss_fn({"w": p["w"], "v": jax.lax.stop_gradient(p["v"])}, m, x)
    _, grads, after = jax.jit(msbp.value_and_grad(loss))(PARAMS, MEMORY, X)
    want, want_after = msbp.value_and_grad(loss_fn)(PARAMS, MEMORY, X)[1:]
    assert_trees_close(grads["w"], want["w"])
    assert_trees_equal(grads["v"], jnp.zeros_like(grads["v"]))
    assert_trees_close(after, want_after)


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(optax.sgd(0.1, momentum=0.9), every_k_schedule=2),
        optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1)),
        optax.chain(optax.clip(1e-3), optax.sgd(0.1)),
    ],
    ids=["MultiSteps", "clip_by_global_norm", "clip"],
)
def test_what_optax_does_with_gradients_does_not_touch_the_memory(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, memory, opt_state, x):
        _, grads, memory = msbp.value_and_grad(loss_fn)(params, memory, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), memory, opt_state

    params, memory = jax.tree.map(jnp.copy, (PARAMS, MEMORY))
    opt_state = jax.tree.map(jnp.asarray, tx.init(params))
    with jax.numpy_dtype_promotion("standard"):
        for i in range(3):
            before = jax.tree.map(jnp.copy, (params, memory))
            params, memory, opt_state = step(params, memory, opt_state, X + i)
            assert_trees_close(memory, msbp.value_and_grad(loss_fn)(*before, X + i)[2])


def test_policies_of_checkpoint_and_donation_change_no_bits():
    optimized = {"xla_backend_optimization_level": 3}  # as a user's program is: without it, sums are ordered otherwise
    want = jax.jit(msbp.value_and_grad(loss_fn), compiler_options=optimized)(PARAMS, MEMORY, X)
    for policy in (None, jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.dots_saveable):
        saved = msbp.sparse_vjp(jax.checkpoint(network, policy=policy), S)
        loss = lambda p, m, x, saved=saved: (saved(p, x, memory=m) ** 2).mean()
        step = jax.jit(msbp.value_and_grad(loss), donate_argnums=1, compiler_options=optimized)
        assert_trees_equal(step(PARAMS, jax.tree.map(jnp.copy, MEMORY), X), want)


def test_ten_thousand_steps_leak_and_compile_nothing():
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, memory, x):
        traces.append(1)
        _, grads, memory = msbp.value_and_grad(loss_fn)(params, memory, x)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), memory

    params, memory = jax.tree.map(jnp.copy, (PARAMS, MEMORY))
    live = None
    for i in range(10_000):
        params, memory = step(params, memory, X)
        if i in (10, 100):
            jax.block_until_ready(params)
            live = len(jax.live_arrays())
    jax.block_until_ready(params)
    assert len(jax.live_arrays()) == live
    assert len(traces) == 1
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((params, memory)))
