"""Measures and studies run under JAX's usual promotion, as they do from the command line."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
