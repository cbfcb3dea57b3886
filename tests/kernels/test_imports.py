"""What importing the package and training on a CPU do without: Pallas, nearly as long an import as all of ours."""

import subprocess
import sys

import pytest

import msbp_jax as msbp

TRAIN = """
import sys, jax, jax.numpy as jnp, msbp_jax as msbp
if jax.default_backend() != "cpu":
    print("no CPU")
    sys.exit()
w, x = jnp.ones((64, 96)), jnp.ones((32, 64))
f = msbp.sparse_vjp(lambda w, x: x @ w, msbp.memorized(msbp.top_k(k=6, rows_per_group=4), decay=0.5))
f.report(w, x)
step = jax.jit(msbp.value_and_grad(lambda w, m, x: (f(w, x, memory=m) ** 2).mean()))
jax.block_until_ready(step(w, f.init_memory(w, x), x))
print(sorted(name for name in sys.modules if name.startswith("jax.experimental.pallas")))
"""
BY_NAME = """
import jax, jax.numpy as jnp, sys, msbp_jax as msbp
assert "jax.experimental.pallas" not in sys.modules
with jax.checking_leaks(), jax.numpy_dtype_promotion("strict"):
    p = jax.jit(lambda g: msbp.kernels.select(g, 4, 8, backend="{platform}"))(jnp.ones((16, 40)))
print("jax.experimental.pallas" in sys.modules, p.index[0].tolist())
"""


def printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_and_training_on_a_cpu_leave_pallas_alone():
    assert printed(TRAIN) in ("[]", "no CPU")


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_backend_that_is_asked_for_by_name_is_imported_while_it_is_traced(platform):
    assert platform in msbp.backends()["select"]
    assert printed(BY_NAME.format(platform=platform)) == "True [0, 1, 2, 3]"
