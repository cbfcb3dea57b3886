"""The native backward of dense convolutions on the images that are kept, in every instruction set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_native import native
from test_sparse_convolution_calls import CASES, F32, REFUSED, normal

from msbp_jax.kernels import images as kernels
from msbp_jax.kernels.convolutions import Geometry
from msbp_jax.kernels.native import calls

WHOLE = {name: case for name, case in CASES.items() if "groups" not in case[3]} | {
    "many channels": ((3, 6, 6), 130, 140, {"window": (3, 3), "padding": ((1, 1), (1, 1))}),
    "one axis": ((4, 40), 3, 5, {"window": (5,), "padding": ((2, 2),)}),
}


def geometry_of(sizes):
    axes = len(sizes["window"])
    return Geometry(**{"strides": (1,) * axes, "padding": ((0, 0),) * axes, "dilation": (1,) * axes} | sizes)


def plain(x, w, geometry, g):
    pixels = "HW"[: len(geometry.window)]
    convolution = lambda x, w: lax.conv_general_dilated(
        x, w, geometry.strides, geometry.padding, rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{pixels}C", f"{pixels}IO", f"N{pixels}C"),
    )  # fmt: skip
    return jax.vjp(convolution, x, w)[1](g)


@native
@pytest.mark.parametrize("number", range(len(calls.instruction_sets())))
@pytest.mark.parametrize("name", WHOLE)
def test_every_instruction_set(number, name, monkeypatch):
    """Against float64; what an image that is left out holds does not matter, and it gets zeros."""
    pixels, channels, features, sizes = WHOLE[name]
    geometry = geometry_of(sizes)
    x, w = normal(0, *pixels, channels), normal(1, *geometry.window, channels, features)
    g = normal(2, pixels[0], *geometry.positions(pixels[1:]), features)
    kept = (jnp.arange(pixels[0]) % 3 != 1).astype(F32)
    real = calls.call
    monkeypatch.setattr(calls, "call", lambda *args, **options: real(*args, **options | {"instruction_set": number}))
    gone = (kept == 0).reshape(-1, *(1,) * (x.ndim - 1))
    dx = kernels.grad_input(jnp.where(gone, jnp.nan, g), kept, w, geometry, pixels[1:])
    dw = kernels.grad_weight(jnp.where(gone, jnp.nan, g), kept, jnp.where(gone, jnp.nan, x), geometry)
    with jax.enable_x64(True):
        exact = lambda a: jnp.asarray(np.asarray(a), jnp.float64)
        want = plain(exact(x), exact(w), geometry, exact(jnp.where(gone, 0, g)))
    for found, right in zip((dx, dw), want, strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * np.abs(right).max(initial=1e-30))


X, G, W = normal(0, 3, 5, 5, 4), normal(1, 3, 4, 4, 6), normal(2, 2, 2, 4, 6)
GEOMETRY, KEPT = geometry_of({"window": (2, 2)}), jnp.array([1.0, 0, 1])


@native
def test_bfloat16_and_members_of_a_vmap():
    low = lambda a: a.astype(jnp.bfloat16)
    dx, dw = plain(low(X).astype(F32), low(W).astype(F32), GEOMETRY, low(G).astype(F32) * KEPT[:, None, None, None])
    np.testing.assert_allclose(kernels.grad_input(low(G), KEPT, low(W), GEOMETRY, (5, 5)), dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kernels.grad_weight(low(G), KEPT, low(X), GEOMETRY), dw, rtol=1e-5, atol=1e-5)
    many, others = jnp.stack([G, 2 * G]), jnp.stack([KEPT, 1 - KEPT])
    together = jax.vmap(lambda g, kept: kernels.grad_weight(g, kept, X, GEOMETRY))(many, others)
    alone = kernels.grad_weight(2 * G, 1 - KEPT, X, GEOMETRY)
    np.testing.assert_allclose(together[1], alone, rtol=1e-5, atol=1e-5)


@native
def test_the_same_by_any_number_of_threads():
    """Sums are cut by shapes alone: the same call twice, and in a loop, where XLA may give it other threads."""
    x, w, g = normal(0, 8, 14, 14, 32), normal(1, 3, 3, 32, 32), normal(2, 8, 12, 12, 32)
    geometry, kept = geometry_of({"window": (3, 3)}), jnp.ones(8)
    once = kernels.grad_weight(g, kept, x, geometry)
    again = lax.map(lambda g: kernels.grad_weight(g, kept, x, geometry), jnp.stack([g, g]))
    np.testing.assert_array_equal(once, again[1])
    assert kernels.grad_input(g, kept, w, geometry, (14, 14)).shape == x.shape


@native
def test_what_runs():
    assert kernels.runs(GEOMETRY, X.shape, 6, F32)
    assert kernels.runs(GEOMETRY, X.shape, 6, jnp.bfloat16)
    assert not kernels.runs(GEOMETRY, X.shape, 6, jnp.float16)
    assert not kernels.runs(GEOMETRY, (0, 5, 5, 4), 6, F32)
    assert not kernels.runs(GEOMETRY, (3, 1, 1, 4), 6, F32)  # no window fits
    assert not kernels.runs(GEOMETRY, X.shape, 3, F32)  # of features so few
    assert not kernels.runs(GEOMETRY, (3, 5, 2**20, 4), 6, F32)
    padded = geometry_of({"window": (1,), "padding": ((2**19, 2**19),)})
    assert not kernels.runs(padded, (1, 2**19, 4), 6, F32)  # positions so many
    assert not kernels.runs(geometry_of({"window": (2, 2), "groups": 2}), X.shape, 6, F32)
    assert not kernels.runs(geometry_of({"window": (2, 2, 2)}), (3, 5, 5, 5, 4), 6, F32)


CALL = {
    "operands": [G, KEPT, X],
    "results": [((2, 2, 4, 6), F32)],
    "axes": GEOMETRY.axes,
}


@native
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"operands": [G, KEPT[:2], X]}, r"weight of images must have shape \[3\], got \[2\]"),
        ({"operands": [G, KEPT.astype(jnp.int32), X]}, "weight of images must be float32"),
        ({"operands": [G.astype(jnp.float16), KEPT, X]}, "cotangent must be float32 or bfloat16"),
        ({"operands": [G[:2], KEPT, X]}, "images of the result must be between 3 and 3, got 2"),
        ({"results": [((2, 2, 4, 5), F32)]}, r"result must have shape \[2, 2, 4, 6\], got \[2, 2, 4, 5\]"),
        ({"axes": GEOMETRY.axes[:4]}, "numbers of the geometry must be between 8 and 8, got 4"),
        ({"axes": GEOMETRY.axes * 0}, "sizes of an image and its window must be between 1"),
        ({"operands": [G[0, 0], KEPT, X]}, "cotangent must have at least 4 axes"),
    ],
)
def test_calls_that_are_refused(change, said):
    """By the native side itself, whatever calls it."""
    options = CALL | change
    operands, results = options.pop("operands"), options.pop("results")
    with pytest.raises(REFUSED, match=said):
        jax.block_until_ready(calls.call("images_grad_weight", operands, results, **options))
