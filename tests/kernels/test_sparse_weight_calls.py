"""The native products with a sparse weight, in every instruction set, and patterns that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_native import native

from msbp_jax.kernels.native import calls
from msbp_jax.kernels.weights.unpacked import packed, unpacked
from msbp_jax.testing import random_gradient
from msbp_jax.weights import gathered, pattern_of, scattered

F32 = jnp.float32


def a_pattern(seed, m, n, density):
    """Return a mask, and its entries feature by feature and input by input, as the kernels take them."""
    mask = np.random.default_rng(seed).random((m, n)) < density
    features, inputs = np.nonzero(mask.T)
    number = np.zeros((m, n), np.int64)
    number[inputs, features] = np.arange(len(inputs))
    rows, columns = np.nonzero(mask)
    starts = lambda counts: jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
    by_feature = starts(mask.sum(0)), jnp.asarray(inputs, jnp.int32)
    by_input = starts(mask.sum(1)), jnp.asarray(columns, jnp.int32), jnp.asarray(number[rows, columns], jnp.int32)
    return (inputs, features), by_feature, by_input


@native
@pytest.mark.parametrize("number", range(len(calls.instruction_sets())))
@pytest.mark.parametrize(("dtype", "other"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize(
    ("rows", "m", "n", "density"),
    [
        (40, 70, 100, 0.2),
        (300, 129, 37, 0.05),
        (7, 2100, 50, 0.1),
        (1, 5, 1300, 0.5),
        (130, 9, 8, 1.0),
        (33, 40, 50, 0.01),
    ],
)
def test_every_instruction_set(number, dtype, other, rows, m, n, density):
    where, (starts, inputs), (starts_t, features, order) = a_pattern(0, m, n, density)
    values = random_gradient(0, 1, len(inputs))[0].astype(dtype)
    x, g = random_gradient(1, rows, m).astype(other), random_gradient(2, rows, n).astype(other)
    w = np.zeros((m, n))
    w[where] = np.asarray(values, np.float64)
    exact_x, exact_g = (np.asarray(a, np.float64) for a in (x, g))
    options = {"instruction_set": number}
    (y,) = calls.call("weight_times", [values, starts, inputs, inputs, x], [((rows, n), F32)], ordered=False, **options)
    (dx,) = calls.call(
        "weight_times", [values, starts_t, features, order, g], [((rows, m), F32)], ordered=True, **options
    )
    (dw,) = calls.call("weight_gradient", [x, g, starts, inputs], [((len(inputs),), F32)], **options)
    for got, want in ((y, exact_x @ w), (dx, exact_g @ w.T), (dw, (exact_x.T @ exact_g)[where])):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max(initial=1e-30))


@native
def test_members_of_a_vmap_and_entries_that_are_there_to_make_patterns_equally_long():
    patterns = [a_pattern(seed, 20, 30, density) for seed, density in enumerate([0.1, 0.3])]
    longest = max(len(where[0]) for where, _, _ in patterns)
    x, g = random_gradient(1, 9, 20), random_gradient(2, 9, 30)
    pad = lambda array: jnp.pad(array, (0, longest - len(array)))
    values = [random_gradient(seed, 1, len(where[0]))[0] for seed, (where, _, _) in enumerate(patterns)]
    starts, inputs = (jnp.stack(parts) for parts in zip(*((s, pad(i)) for _, (s, i), _ in patterns), strict=True))
    times = lambda v, s, i: calls.call("weight_times", [v, s, i, i, x], [((9, 30), F32)], ordered=False)[0]
    gradient = lambda s, i: calls.call("weight_gradient", [x, g, s, i], [((longest,), F32)])[0]
    y, dw = jax.vmap(times)(jnp.stack(list(map(pad, values))), starts, inputs), jax.vmap(gradient)(starts, inputs)
    for member, (where, _, _) in enumerate(patterns):
        w = np.zeros((20, 30))
        w[where] = values[member]
        np.testing.assert_allclose(y[member], np.asarray(x) @ w, atol=1e-4)
        np.testing.assert_allclose(dw[member][: len(where[0])], (np.asarray(x).T @ np.asarray(g))[where], rtol=1e-4)
        np.testing.assert_array_equal(dw[member][len(where[0]) :], 0)


VALUES, STARTS, INPUTS, X, G = jnp.ones(4), [0, 2, 2, 4], [0, 3, 1, 2], jnp.ones((6, 5)), jnp.ones((6, 3))
ints = lambda numbers: jnp.asarray(numbers, jnp.int32)


@native
@pytest.mark.parametrize(
    ("starts", "inputs"),
    [
        ([0, 2, 2, 5], INPUTS),  # more than there are
        ([1, 2, 2, 4], INPUTS),
        ([0, 3, 2, 4], INPUTS),
        ([0, -1, 2, 4], INPUTS),
        (STARTS, [0, 5, 1, 2]),
        (STARTS, [0, -1, 1, 2]),
        (STARTS, [0, 3, 1, 2**31 - 1]),
    ],
)
def test_patterns_out_of_range(starts, inputs):
    starts, inputs = ints(starts), ints(inputs)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a pattern's indices must be in range"):
        jax.block_until_ready(
            calls.call("weight_times", [VALUES, starts, inputs, inputs, X], [((6, 3), F32)], ordered=False)
        )
    with pytest.raises(jax.errors.JaxRuntimeError, match="a pattern's indices must be in range"):
        jax.block_until_ready(calls.call("weight_gradient", [X, G, starts, inputs], [((4,), F32)]))


@native
def test_an_order_out_of_range():
    arrays = [VALUES, ints(STARTS), ints(INPUTS), ints([0, 1, 2, 4]), X]
    with pytest.raises(jax.errors.JaxRuntimeError, match="a pattern's indices must be in range"):
        jax.block_until_ready(calls.call("weight_times", arrays, [((6, 3), F32)], ordered=True))


@native
@pytest.mark.parametrize(
    ("name", "arrays", "result"),
    [
        ("weight_times", [VALUES, ints(STARTS), ints(INPUTS), ints(INPUTS), X], ((6, 4), F32)),
        ("weight_times", [VALUES, ints(STARTS), ints(INPUTS)[:3], ints(INPUTS), X], ((6, 3), F32)),
        ("weight_times", [VALUES.astype(int), ints(STARTS), ints(INPUTS), ints(INPUTS), X], ((6, 3), F32)),
        ("weight_times", [VALUES, ints(STARTS).astype(F32), ints(INPUTS), ints(INPUTS), X], ((6, 3), F32)),
        ("weight_times", [VALUES, ints(STARTS), ints(INPUTS), ints(INPUTS), X[:, :0]], ((6, 3), F32)),
        ("weight_gradient", [X, G, ints(STARTS)[:3], ints(INPUTS)], ((4,), F32)),
        ("weight_gradient", [X, G[:5], ints(STARTS), ints(INPUTS)], ((4,), F32)),
        ("weight_gradient", [X, G, ints(STARTS), ints(INPUTS)], ((5,), F32)),
        ("unpack", [VALUES, ints(STARTS), ints(INPUTS)], ((5, 4), F32)),
        ("unpack", [VALUES, ints(STARTS), ints(INPUTS)[:3]], ((5, 3), F32)),
        ("unpack", [VALUES, ints(STARTS), ints(INPUTS)], ((5, 3), jnp.bfloat16)),
        ("pack", [G, ints(STARTS), ints(INPUTS).astype(F32)], ((4,), F32)),
        ("pack", [X, ints(STARTS), ints(INPUTS)], ((4,), F32)),
    ],
)
def test_handlers_refuse_what_does_not_fit(name, arrays, result):
    options = {"ordered": False} if name == "weight_times" else {}
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"msbp_jax: .* must (be|have) "):
        jax.block_until_ready(calls.call(name, arrays, [result], **options))


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_weights_of_entries_and_back(dtype):
    """Bit for bit, in stacked layers, and 0 for what is there to make patterns equally long."""
    mask = np.random.default_rng(0).random((2, 70, 33)) < 0.3
    mask[1, 5:9] = False
    pattern = pattern_of(mask, stacked=1)
    values = jax.random.normal(jax.random.key(0), pattern.inputs.shape).astype(dtype)
    values = gathered(pattern, scattered(pattern, values))  # padding is 0
    dense = jax.vmap(unpacked)(values, pattern)
    np.testing.assert_array_equal(dense, scattered(pattern, values))
    np.testing.assert_array_equal(jax.vmap(packed)(dense, pattern), values)
    assert dense.dtype == values.dtype


@native
def test_patterns_out_of_range_are_not_unpacked():
    for inputs in ([0, 3, 1, 5], [0, -1, 1, 2]):
        for name, array, result in (("unpack", VALUES, ((5, 3), F32)), ("pack", jnp.ones((5, 3)), ((4,), F32))):
            with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="a pattern's indices must be in range"):
                jax.block_until_ready(calls.call(name, [array, ints(STARTS), ints(inputs)], [result]))
