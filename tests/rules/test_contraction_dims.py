"""The dimension algebra: any dot_general equals the canonical product, whichever operand is the weight."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msbp_jax.rules import contraction


@st.composite
def dot_generals(draw):
    """Draw (dimension_numbers, lhs, rhs) of integers in float64, so that every order of summation is exact."""
    sizes = st.integers(1, 3)
    batch = draw(st.lists(sizes, max_size=2))
    contracted = draw(st.lists(sizes, min_size=1, max_size=2))
    lhs_free, rhs_free = draw(st.lists(sizes, max_size=2)), draw(st.lists(sizes, max_size=2))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))

    def operand(free):
        tags = [("b", i) for i in range(len(batch))] + [("c", i) for i in range(len(contracted))]
        tags += [("f", i) for i in range(len(free))]
        order = draw(st.permutations(tags))
        size = {"b": batch, "c": contracted, "f": free}
        array = rng.integers(-4, 5, [size[kind][i] for kind, i in order]).astype(np.float32)
        return (
            array,
            [order.index(("c", i)) for i in range(len(contracted))],
            [order.index(("b", i)) for i in range(len(batch))],
        )

    lhs, lc, lb = operand(lhs_free)
    rhs, rc, rb = operand(rhs_free)
    return ((tuple(lc), tuple(rc)), (tuple(lb), tuple(rb))), lhs, rhs


@hypothesis.given(dot_generals(), st.sampled_from(["lhs", "rhs"]))
def test_canonical_products_are_the_program_s(problem, side):
    dims, lhs, rhs = problem
    c = contraction(dims, lhs.shape, rhs.shape, side)
    turned = lambda w: w if c.feature_axis == 1 else jnp.swapaxes(w, 1, 2)

    @jax.jit  # one program for each problem, not one for each operation
    def run(lhs, rhs):
        y, pullback = jax.vjp(lambda a, b: jax.lax.dot_general(a, b, dims), lhs, rhs)
        g = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape) - 3
        x, w = (rhs, lhs) if side == "lhs" else (lhs, rhs)
        cx, cw, cg = c.canonical_x(x), turned(c.canonical_w(w)), c.canonical_g(g)
        dlhs, drhs = pullback(g)
        want = (y, g, *((drhs, dlhs) if side == "lhs" else (dlhs, drhs)))
        dx, dw = cg @ jnp.swapaxes(cw, 1, 2), turned(jnp.swapaxes(cx, 1, 2) @ cg)
        return (c.program_g(cx @ cw, y.shape), c.program_g(cg, y.shape), c.program_x(dx), c.program_w(dw)), want, cg

    got, want, cg = run(lhs, rhs)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (c.batch, c.rows, c.n) == cg.shape


@pytest.mark.parametrize(("w_shape", "w_contracted", "axis"), [((5, 7), 0, 1), ((7, 5), 1, 0)])
def test_neither_layout_of_a_matrix_is_transposed(w_shape, w_contracted, axis):
    c = contraction((((1,), (w_contracted,)), ((), ())), (3, 5), w_shape, "rhs")
    assert (c.w_order, c.feature_axis, c.m, c.n) == ((0, 1), axis, 5, 7)
