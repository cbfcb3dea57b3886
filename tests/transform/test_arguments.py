"""Arguments that are no arrays, or arrays without axes: what plain JAX lets a function do with them, it may."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from twins import assert_trees_close, assert_trees_equal

import msbp_jax as msbp

N = 64
S = msbp.memorized(msbp.top_k(k=7), 0.5)
W = jax.random.normal(jax.random.key(0), (6, N))
X = jax.random.normal(jax.random.key(1), (4, 6))


def branching(w, x, flag):
    return (x * 2 if flag else x) @ w


def reshaping(w, x, size):
    return x.reshape(size, -1).reshape(4, 6) @ w


def comparing(w, x, name):
    return (x * 2 if name == "a" else x) @ w


def indexing(w, x, number):
    return [x, x * 2][number] @ w


def looping(w, x, number):
    for _ in range(number):
        x = x * 2
    return x @ w


def scaling(w, x, number):
    return x @ (w * number)


def nested(w, x, options):
    return (x * options["by"][0] if options["flag"] else x) @ w


CASES = [
    *((branching, flag) for flag in (True, np.bool_(True), np.array(True), jnp.array(True), np.int32(1), jnp.int32(0))),
    *((reshaping, size) for size in (8, np.int64(8), np.array(8), np.uint8(8), jnp.int32(8))),
    *((comparing, name) for name in ("a", np.str_("a"), np.str_("b"))),
    *((indexing, number) for number in (1, np.int64(1), jnp.int32(1))),
    *((looping, number) for number in (2, np.int64(2), jnp.int32(2))),
    *((scaling, number) for number in (2.0, np.float32(2), np.array(2, np.float32), jnp.float32(2), np.float64(2))),
    *((nested, {"flag": flag, "by": (3.0, None)}) for flag in (np.bool_(True), jnp.array(False))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "argument"), CASES, ids=lambda value: getattr(value, "__name__", repr(value)))
@pytest.mark.parametrize("by_name", [False, True])
def test_a_function_asks_for_values(function, argument, by_name):
    f = msbp.sparse_vjp(function, S)
    name = function.__code__.co_varnames[2]
    args, kwargs = ((), {name: argument}) if by_name else ((argument,), {})
    with jax.numpy_dtype_promotion("standard"):  # plain JAX is strict of NumPy's float64, here
        memory = f.init_memory(W, X, *args, **kwargs)
        assert list(memory) == ["params"]
        assert_trees_equal(f(W, X, *args, memory=memory, **kwargs), function(W, X, *args, **kwargs))
        step = msbp.value_and_grad(lambda w, m, x: (f(w, x, *args, memory=m, **kwargs) ** 2).mean())
        loss, _, after = step(W, memory, X)
        assert_trees_close(loss, (function(W, X, *args, **kwargs) ** 2).mean())
        compiled = jax.jit(step)(W, memory, X)
    assert_trees_close(compiled[0], loss)
    assert np.any(after["params"].residual)


@pytest.mark.parametrize("flag", [np.bool_(True), jnp.array(True)], ids=["numpy", "jax"])
def test_flags_of_flax_modules(flag):
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(N)(nn.Dropout(0.5, deterministic=not train)(x) if train else x)

    class NNX(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(6, N, rngs=nnx.Rngs(0))

        def __call__(self, x, train):
            return self.layer(x * 2 if train else x)

    linen = msbp.sparse_vjp(Linen(), S)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = linen.init(rngs, X, flag)
    own = {"dropout": jax.random.key(2)}
    memory = linen.init_memory(variables, X, flag, rngs=own)
    assert_trees_equal(
        linen.apply(variables, X, flag, rngs=own, memory=memory), Linen().apply(variables, X, flag, rngs=own)
    )
    model = msbp.sparse_vjp(NNX(), S)
    model.init_memory(X, flag)
    assert_trees_equal(model(X, train=flag), model.module(X, flag))
    assert_trees_equal(model(X, train=~flag), model.module(X, False))


@pytest.mark.parametrize("argument", [np.bool_(True), jnp.array(True), True])
def test_under_jit_a_flag_is_traced_as_ever(argument):
    f = msbp.sparse_vjp(branching, S)
    memory = f.init_memory(W, X, argument)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda flag: f(W, X, flag, memory=memory))(argument)


@pytest.mark.slow
def test_numbers_are_data_however_they_come():
    """A network of one number: its layers have the same sites be it concrete, traced or abstract."""

    def network(p, t):
        h = jnp.tanh(jnp.stack([t, t**2])[None] @ p["in"])
        return (h @ p["mid"]).sum()

    p = {"in": W[:2], "mid": jax.random.normal(jax.random.key(2), (N, N))}
    f = msbp.sparse_vjp(network, S)
    times = [jnp.float32(2), np.array(2, np.float32), jax.ShapeDtypeStruct((), jnp.float32)]
    for time in times:
        assert [row.name for row in f.report(p, time).sparse] == ["in", "mid"]
    memory = f.init_memory(p, times[0])
    over = jax.vmap(lambda p, m, t: f(p, t, memory=m), (None, None, 0))
    _, _, after = msbp.value_and_grad(lambda p, m, t: over(p, m, t).mean())(p, memory, jnp.arange(3.0))
    assert all(np.any(state.residual) for state in after.values())


@pytest.mark.parametrize("number", [2.0, np.float32(2), np.array(2, np.float32), jnp.float32(2)], ids=repr)
def test_a_weight_times_a_number_is_a_weight_however_it_comes(number):
    layer = jax.jit(scaling)
    f = msbp.sparse_vjp(lambda w, x, number: layer(w, x, number) + x @ (w / number), S)
    memory = f.init_memory(W, X, number)
    assert list(memory) == ["params", "params#2"]
    step = msbp.value_and_grad(lambda w, m, x, number: (f(w, x, number, memory=m) ** 2).mean())
    eager, compiled = step(W, memory, X, number), jax.jit(step)(W, memory, X, number)
    assert_trees_close(eager, compiled)
    assert all(np.any(state.residual) for state in compiled[2].values())


def test_a_number_over_a_weight_is_none():
    report = msbp.sparse_vjp(lambda p, x, t: x @ (t / p["w"]) + x @ p["v"], S).report(
        {"w": W + 9, "v": W}, X, jnp.ones(())
    )
    assert [row.name for row in report.sparse] == ["v"]


@pytest.mark.parametrize("flag", [np.array(["a", "b"]), np.array("a"), np.array([None, 1], dtype=object)])
def test_numpy_arrays_of_text_and_objects_are_passed_as_they_are(flag):
    def g(w, x, flag):
        assert isinstance(flag, np.ndarray)
        return x @ w if flag.dtype.kind in "UO" else x

    f = msbp.sparse_vjp(g, msbp.memorized(msbp.top_k(k=6), 0.5))
    w, x = jnp.ones((8, 64)), jnp.ones((6, 8))
    memory = f.init_memory(w, x, flag)
    _, _, after = msbp.value_and_grad(lambda w, m: f(w, x, flag, memory=m).mean())(w, memory)
    assert after["params"].residual.any()


@pytest.mark.parametrize(
    ("number", "test"),
    [
        (jnp.int32(3), lambda n: n > 1),
        (jnp.array(True), lambda n: ~n == False),  # noqa: E712
        (jnp.uint8(3), lambda n: n % 2 == 1 and float(n) == 3),
        (np.int64(3), lambda n: n + 1 == 4),
    ],
)
def test_what_is_computed_from_a_concrete_scalar_can_be_asked_for(number, test):
    f = msbp.sparse_vjp(lambda w, x, n: x @ w if test(n) else x.sum(), msbp.top_k(k=6))
    w, x = jnp.ones((8, 64)), jnp.ones((6, 8))
    assert set(f.init_memory(w, x, number)) == {"params"}
    assert f(w, x, number, memory=f.init_memory(w, x, number)).shape == (6, 64)
