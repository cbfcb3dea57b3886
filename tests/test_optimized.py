"""Numbers as users compute them: at XLA's own level of optimization, which the rest of the suite does without.

Optimized code fuses, contracts a product and a sum into one rounding, and sums in vectors. XLA reads its flags once a
process, so that this is another one.
"""

import os
import re
import subprocess
import sys

import pytest

import msbp_jax as msbp

# Every backend that runs on a CPU of every op, in float32; every instruction set, both dtypes; the recursion of the
# memory; and whole training steps with an optimizer.
TESTS = [
    "tests/kernels/test_kernel_ops.py::test_against_float64",
    "tests/kernels/test_native.py::test_every_instruction_set",
    "tests/kernels/test_native.py::test_transformations_keep_the_bits",
    "tests/kernels/test_rows.py::test_every_instruction_set",
    "tests/transform/test_skip_zero_rows.py::test_bit_for_bit_where_no_row_is_0",
    "tests/memory/test_memorized.py::test_recursion",
    "tests/training/test_train_state_and_diagnose.py::test_train_step_equals_the_loop_written_out",
]


@pytest.mark.slow
def test_at_the_default_level_of_optimization(pytestconfig):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not (float64 and float16)", *TESTS]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=pytestconfig.rootpath,
        env=environment | {"XLA_FLAGS": ""},  # unset, tests/conftest.py would set it
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert "XLA_FLAGS: ''" in done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > (60 if "native" in msbp.backends()["grad_input"] else 50)
