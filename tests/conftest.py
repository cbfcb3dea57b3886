"""A strict session: eight virtual devices, no implicit promotion of dtypes or ranks."""

import gc
import os
import sys

# Tests ask for numbers, not for speed, and most of their time is compiling: LLVM need not optimize what XLA gives it.
# XLA's own passes, which fuse and lay out, are the usual ones. To be set before JAX is loaded. tests/test_optimized.py
# runs a choice of tests without. On an accelerator everything is as its users have it.
if "--accelerator" not in sys.argv:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import pytest


def pytest_addoption(parser):
    parser.addoption("--accelerator", action="store_true", help="use the GPU or TPU of this machine, not the CPU")


def pytest_report_header():
    return f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', '')!r}"


def pytest_configure(config):
    if not config.getoption("--accelerator"):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=15)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _check_leaks(request):
    """Look for leaked tracers where a test asks for it: the search switches JAX's caches off, and takes its time."""
    if not request.node.get_closest_marker("leaks"):
        yield
        return
    # The search reads every object there is, again and again; the tracers of this test are not among those of others.
    gc.freeze()
    with jax.checking_leaks():
        yield
    gc.unfreeze()
