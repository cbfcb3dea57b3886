"""The places of the largest of many numbers, of which only the run tells how many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import native

from msbp_jax.kernels import places
from msbp_jax.kernels.native import calls

BACKENDS = ["xla", *(["native"] if calls.available() else [])]
WORTH = st.one_of(st.integers(-2, 3).map(float), st.just(np.nan), st.just(np.inf), st.floats(0, 1, width=32))


def by_numpy(scores, count, most):
    at = [i for i, score in enumerate(scores) if score >= 0]
    best = sorted(at, key=lambda i: -scores[i])[: max(0, min(count, most))]
    return np.array([*sorted(best), *[len(scores)] * most])[:most]


@settings(max_examples=60)
@given(st.lists(WORTH, min_size=1, max_size=30), st.integers(0, 33), st.integers(1, 33))
def test_against_numpy(scores, count, most):
    """Ties go to the first; what is negative or no number is never taken."""
    for backend in BACKENDS:
        found = places.largest(jnp.asarray(scores, jnp.float32), jnp.int32(count), most, backend=backend)
        np.testing.assert_array_equal(found, by_numpy(scores, count, most))


def test_what_is_chosen_and_members_of_a_vmap():
    scores = jax.random.uniform(jax.random.key(0), (3, 50))
    count = jnp.asarray([0, 5, 50])
    found = jax.jit(jax.vmap(lambda scores, count: places.largest(scores, count, 20)))(scores, count)
    for row, own, many in zip(found, scores, count, strict=True):
        np.testing.assert_array_equal(row, by_numpy(np.asarray(own), int(many), 20))
    narrow = places.largest(scores[0].astype(jnp.bfloat16), count[1], 20)
    np.testing.assert_array_equal(narrow, by_numpy(np.asarray(scores[0].astype(jnp.bfloat16), np.float32), 5, 20))
    lowered = jax.jit(lambda scores: places.largest(scores, count[1], 20)).lower(scores[0]).as_text()
    assert ("msbp_largest" in lowered) == calls.available()
    assert "top_k" in jax.jit(lambda scores: places.largest(scores, count[1], 20)).lower(
        scores[0].astype(jnp.bfloat16)
    ).as_text()  # fmt: skip


@native
@pytest.mark.parametrize(
    ("arrays", "result"),
    [
        ([jnp.ones(4), jnp.ones(2, jnp.int32)], ((3,), jnp.int32)),
        ([jnp.ones(4), jnp.ones(1)], ((3,), jnp.int32)),
        ([jnp.ones(4, jnp.bfloat16), jnp.ones(1, jnp.int32)], ((3,), jnp.int32)),
        ([jnp.ones(4), jnp.ones(1, jnp.int32)], ((3,), jnp.float32)),
        ([jnp.ones(0), jnp.ones(1, jnp.int32)], ((3,), jnp.int32)),
    ],
)
def test_handlers_refuse_what_does_not_fit(arrays, result):
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"msbp_jax: .* must (be|have) "):
        jax.block_until_ready(calls.call("largest", arrays, [result]))
