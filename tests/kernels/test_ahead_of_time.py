"""The kernels and a training step, compiled for chips that need not be here, by the vendors' own compilers.

What does not fit a chip (a tile too large for its fast memory, an instruction it has not) fails in these compilers.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from ahead_of_time import GPUS, TPUS
from test_pallas import KERNELS

pytestmark = pytest.mark.slow

WORKER = pathlib.Path(__file__).with_name("ahead_of_time.py")
# `make test` installs the compilers beside the environment, so that nothing else that runs in it meets their plugins.
BESIDE = pathlib.Path(sys.prefix) / "aot"
COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
CHIPS = {"tpu": set(TPUS), "gpu": set(GPUS)}


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_compile_for_every_chip(platform):
    compiler = COMPILERS[platform]
    if importlib.util.find_spec(compiler) is None and not (BESIDE / compiler).exists():
        pytest.skip(f"{compiler} is not installed; pip install 'msbp-jax[aot]', or make test")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), str(BESIDE)])}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, str(WORKER), platform], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["chip"] for row in found} == CHIPS[platform]
    for row in found:
        name, kernels = row["program"], set(row["kernels"])
        if name in ("mapped", "step", "shard_map"):
            assert kernels == KERNELS[platform], row
        elif name == "tiles":  # XLA's own products, of floats
            assert (row["whole_products"], kernels) == (0, set()), row
        elif name == "8 bits":  # XLA's own products, 8 by 8 bits
            assert (row["whole_products"], kernels) == (2, set()), row
        else:
            assert kernels, row
        if platform == "tpu":
            assert row["operations"] > 0, row
            assert row["bytes"] > 0, row
        if "8192" in name:
            check_budget(platform, row)


def check_budget(platform, row):
    """Hold a layer of 8,192 rows, inputs and outputs at density 1/16, bfloat16, to its memory beside arguments."""
    whole = 8192 * 8192 * 2
    # The weight transposed or in words, once and in parts; the products of dw that stay in the cache; scores.
    limit = {"grad_input": (2 if platform == "tpu" else 1) * whole, "grad_weight": 32 * 2**20}
    allowed = limit.get(row["program"].split(",")[0], 0) + 8 * 2**20
    assert row["temporary_bytes"] <= allowed, row
    if platform == "tpu":
        # Each kernel tells XLA's scheduler what it does: both products at density 1/16, within a tenth.
        products = 2 * 8192 * 512 * 8192
        if "grad" in row["program"]:
            assert products <= row["operations"] <= 1.1 * products, row
