"""The native convolutions with a sparse kernel, in every instruction set, and calls that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_native import native

from msbp_jax.kernels import convolutions as kernels
from msbp_jax.kernels.convolutions import Geometry
from msbp_jax.kernels.convolutions import native as native_kernels
from msbp_jax.kernels.native import calls
from msbp_jax.testing import random_gradient
from msbp_jax.weights import gathered, pattern_of, scattered

F32 = jnp.float32
REFUSED = (jax.errors.JaxRuntimeError, ValueError)  # where a call ran at once, and where it ran later


def normal(seed, *shape):
    return random_gradient(seed, 1, int(np.prod(shape)))[0].reshape(shape)


# Images [images, height, width], channels, features, and the window: a band of a tall image, several images in a plane,
# strides with phases that nothing reads, padding that cuts off.
CASES = {
    "3x3": ((5, 14, 14), 6, 9, {"window": (3, 3), "padding": ((1, 1), (1, 1))}),
    "strides": ((3, 13, 9), 4, 5, {"window": (3, 2), "strides": (2, 3), "padding": ((0, 1), (1, 0))}),
    "1x1, stride 2": ((4, 8, 8), 5, 7, {"window": (1, 1), "strides": (2, 2)}),
    "dilated": ((2, 12, 12), 3, 4, {"window": (3, 3), "dilation": (2, 3), "padding": ((2, 2), (3, 3))}),
    "groups": ((3, 7, 7), 8, 12, {"window": (3, 3), "padding": ((1, 1), (1, 1)), "groups": 4}),
    "depthwise": ((2, 9, 9), 6, 6, {"window": (3, 3), "padding": ((1, 1), (1, 1)), "groups": 6}),
    "cut off": ((2, 10, 11), 3, 4, {"window": (2, 2), "padding": ((-1, -2), (2, -3))}),
    "bands": ((1, 120, 90), 40, 3, {"window": (3, 3), "padding": ((1, 1), (1, 1))}),
    "several images in a plane": ((40, 4, 4), 5, 6, {"window": (3, 3), "padding": ((1, 1), (1, 1))}),
    "one large image": ((1, 40, 40), 3, 3, {"window": (5, 3), "padding": ((2, 2), (1, 1))}),
    "one row": ((4, 1, 40), 3, 5, {"window": (1, 5), "padding": ((0, 0), (2, 2))}),
}


@native
@pytest.mark.parametrize("number", range(len(calls.instruction_sets())))
@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set(number, name, monkeypatch):
    """Against float64, and what is no entry has no gradient."""
    pixels, channels, features, sizes = CASES[name]
    geometry = Geometry(**{"strides": (1, 1), "padding": ((0, 0),) * 2, "dilation": (1, 1)} | sizes)
    x = normal(0, *pixels, channels)
    w = normal(1, *geometry.window, channels // geometry.groups, features)
    mask = np.random.default_rng(0).random(w.shape) < 0.3
    pattern = pattern_of(jnp.asarray(mask), input_axes=3)
    values = gathered(pattern, w)
    g = normal(2, pixels[0], *geometry.positions(pixels[1:]), features)
    real = calls.call
    monkeypatch.setattr(calls, "call", lambda *args, **options: real(*args, **options | {"instruction_set": number}))
    got = _all("native", x, g, values, pattern, geometry)
    with jax.enable_x64(True):
        exact = lambda a: jnp.asarray(np.asarray(a), jnp.float64)
        dense = lambda x, w: lax.conv_general_dilated(
            x, w, geometry.strides, geometry.padding, rhs_dilation=geometry.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=geometry.groups,
        )  # fmt: skip
        y, pull_back = jax.vjp(dense, exact(x), exact(np.where(mask, w, 0)))
        dx, dw = pull_back(exact(g))
    for found, want in zip(got, (y, dx, gathered(pattern, jnp.asarray(np.asarray(dw), F32))), strict=True):
        want = np.asarray(want)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max(initial=1e-30))
    for backend in ("xla", "unpacked"):
        for ours, other in zip(got, _all(backend, x, g, values, pattern, geometry), strict=True):
            np.testing.assert_allclose(ours, other, rtol=0, atol=2e-5 * np.abs(np.asarray(other)).max())


def _all(backend, x, g, values, pattern, geometry):
    return (
        kernels.times(x, values, pattern, geometry, backend=backend),
        kernels.input_gradient(g, values, pattern, geometry, x.shape, backend=backend),
        kernels.weight_gradient(x, g, pattern, geometry, backend=backend),
    )


GEOMETRY = Geometry(window=(2, 2), strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
X, G, W = normal(0, 3, 5, 5, 4), normal(1, 3, 4, 4, 6), normal(2, 2, 2, 4, 6)
PATTERN = pattern_of(jnp.asarray(np.random.default_rng(1).random(W.shape) < 0.4), input_axes=3)
VALUES = gathered(PATTERN, W)


@native
def test_bfloat16_and_members_of_a_vmap():
    low = lambda a: a.astype(jnp.bfloat16)
    y = kernels.times(low(X), low(VALUES), PATTERN, GEOMETRY, backend="native")
    assert y.dtype == F32
    want = kernels.times(low(X).astype(F32), low(VALUES).astype(F32), PATTERN, GEOMETRY, backend="xla")
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    many = jnp.stack([VALUES, 2 * VALUES])
    run = lambda values, x: kernels.times(x, values, PATTERN, GEOMETRY, backend="native")
    together = jax.vmap(run, in_axes=(0, None))(many, X)
    np.testing.assert_allclose(together[1], 2 * run(VALUES, X), rtol=1e-5, atol=1e-6)
    both = jax.vmap(lambda x, g: kernels.weight_gradient(x, g, PATTERN, GEOMETRY, backend="native"))(
        jnp.stack([X, X + 1]), jnp.stack([G, G])
    )
    np.testing.assert_allclose(both[1], kernels.weight_gradient(X + 1, G, PATTERN, GEOMETRY), rtol=1e-4, atol=1e-4)


def test_nothing_to_compute():
    """No images, and a window that fits nowhere."""
    empty = kernels.times(X[:0], VALUES, PATTERN, GEOMETRY)
    assert empty.shape == (0, 4, 4, 6)
    dw = kernels.weight_gradient(X[:0], G[:0], PATTERN, GEOMETRY)
    np.testing.assert_array_equal(dw, np.zeros(PATTERN.entries))
    assert kernels.times(X[:, :1], VALUES, PATTERN, GEOMETRY).shape == (3, 0, 4, 6)


def test_what_is_chosen():
    """Lists up to the share where they are measured to be faster; plain XLA on other platforms and for large images."""
    available = "native" if calls.available() else "xla"
    assert kernels.chosen(PATTERN, GEOMETRY, X.shape, F32, F32) == available
    wide = pattern_of(jnp.asarray(np.random.default_rng(1).random((3, 3, 128, 4)) < 0.4), input_axes=3)
    three = Geometry(window=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    assert kernels.break_even(wide) == 0.3
    assert kernels.break_even(PATTERN) == 0.5
    otherwise = "unpacked" if calls.available() else "xla"
    assert kernels.chosen(wide, three, (2, 8, 8, 128), F32, F32) == otherwise
    assert kernels.chosen(PATTERN, GEOMETRY, (2, 2**20, 4, 4), F32, F32) == otherwise
    assert kernels.chosen(PATTERN, GEOMETRY, (0, 5, 5, 4), F32, F32) == "xla"
    assert kernels.chosen(PATTERN, GEOMETRY, X.shape, jnp.float16, F32) == "xla"
    with pytest.raises(NotImplementedError, match="no images as large as"):
        native_kernels.check_size(GEOMETRY, (2, 2**20, 4, 4), 6)
    with pytest.raises(NotImplementedError, match="images of 1 or 2 axes, got 3"):
        native_kernels.check_size(
            Geometry(window=(1,) * 3, strides=(1,) * 3, padding=((0, 0),) * 3, dilation=(1,) * 3), (1, 2, 2, 2, 3), 4
        )
    with pytest.raises(NotImplementedError, match='backend="tiles" multiplies matrices'):
        kernels.times(X, VALUES, PATTERN, GEOMETRY, backend="tiles")


AXES = np.asarray([2, 1, 1, 0] * 2)
FORWARD = [VALUES, PATTERN.starts, PATTERN.inputs, PATTERN.order, X]
OUT = ((3, 4, 4, 6), F32)


@native
@pytest.mark.parametrize(
    ("arrays", "result", "options"),
    [
        (FORWARD, ((2, 4, 4, 6), F32), {}),
        (FORWARD, ((3, 4, 4, 5), F32), {}),
        ([VALUES[:-1], *FORWARD[1:]], OUT, {}),
        ([VALUES, PATTERN.starts[:-1], *FORWARD[2:]], OUT, {}),
        ([VALUES.astype(int), *FORWARD[1:]], OUT, {}),
        ([*FORWARD[:4], X[:, :0]], OUT, {}),
        (FORWARD, OUT, {"groups": 5}),
        (FORWARD, OUT, {"groups": 0}),
        (FORWARD, OUT, {"axes": AXES[:4]}),
        (FORWARD, OUT, {"axes": np.asarray([2, 0, 1, 0] * 2)}),
        (FORWARD, OUT, {"axes": np.asarray([2, 1, 1, 2**21] * 2)}),
    ],
)
def test_handlers_refuse_what_does_not_fit(arrays, result, options):
    options = {"of_gradient": False, "axes": AXES, "groups": 1} | options
    with pytest.raises(REFUSED, match=r"msbp_jax: .* must (be|have|divide) "):
        jax.block_until_ready(calls.call("sparse_convolution", arrays, [result], **options))


@native
@pytest.mark.parametrize("wrong", [-1, 16, 2**31 - 1])
def test_patterns_out_of_range(wrong):
    options = {"axes": AXES, "groups": 1}
    refused = lambda: pytest.raises(REFUSED, match="a pattern's indices must be in range")
    inputs = PATTERN.inputs.at[3].set(wrong)
    with refused():
        jax.block_until_ready(
            calls.call("sparse_convolution", [*FORWARD[:2], inputs, *FORWARD[3:]], [OUT], of_gradient=False, **options)
        )
    with refused():
        arrays = [X, G, PATTERN.starts, inputs]
        jax.block_until_ready(calls.call("sparse_convolution_gradient", arrays, [((PATTERN.entries,), F32)], **options))
    order = PATTERN.order.at[3].set(wrong if wrong != 16 else PATTERN.entries)
    backward = [VALUES, PATTERN.input_starts, PATTERN.features, order, G]
    features = [VALUES, PATTERN.input_starts, PATTERN.features.at[3].set(wrong), PATTERN.order, G]
    with refused():
        jax.block_until_ready(
            calls.call("sparse_convolution", features, [((3, 5, 5, 4), F32)], of_gradient=True, **options)
        )
    falling = [VALUES, PATTERN.starts.at[2].set(0), *FORWARD[2:]]
    with refused():
        jax.block_until_ready(calls.call("sparse_convolution", falling, [OUT], of_gradient=False, **options))
    with refused():
        jax.block_until_ready(
            calls.call("sparse_convolution", backward, [((3, 5, 5, 4), F32)], of_gradient=True, **options)
        )


@native
def test_the_same_bits_at_every_call():
    """Partial sums of dw are as many whatever the threads, of which there are several for so much work."""
    x, g = normal(3, 37, 20, 20, 8), normal(4, 37, 19, 19, 6)
    pattern = pattern_of(jnp.asarray(np.random.default_rng(2).random((2, 2, 8, 6)) < 0.5), input_axes=3)
    run = jax.jit(lambda x, g: kernels.weight_gradient(x, g, pattern, GEOMETRY, backend="native"))
    first = np.asarray(run(x, g))
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(run(x, g)), first)
    assert np.abs(scattered(pattern, first)).max() > 0


@native
def test_pixels_that_no_window_reads_may_hold_anything():
    """What a stride leaves over, and what padding cuts off."""
    x = X.at[:, 4].set(jnp.nan).at[:, :, 0].set(jnp.inf)
    geometry = Geometry(window=(2, 2), strides=(2, 2), padding=((0, 0), (-1, 0)), dilation=(1, 1))
    g = normal(5, 3, *geometry.positions((5, 5)), 6)
    run = lambda x: (
        kernels.times(x, VALUES, PATTERN, geometry, backend="native"),
        kernels.weight_gradient(x, g, PATTERN, geometry, backend="native"),
    )
    jax.tree.map(np.testing.assert_array_equal, run(x), run(X))
