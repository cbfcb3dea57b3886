"""Two real processes, joined by `jax.distributed` on loopback: the numbers of one process."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // int(sys.argv[2]))
if int(sys.argv[2]) > 1:
    jax.distributed.initialize(sys.argv[3], num_processes=2, process_id=int(sys.argv[1]))
import jax.numpy as jnp, numpy as np, msbp_jax as msbp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
rng = np.random.default_rng(0)
params = {"w": rng.normal(size=(16, 64)).astype("f") / 4, "v": rng.normal(size=(64, 64)).astype("f") / 8}
data = rng.normal(size=(64, 16)).astype("f")
network = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])
put = lambda tree, s: jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, s, lambda i: np.asarray(a[i])), tree)
mapped = jax.shard_map(network, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")),
                       out_specs=PartitionSpec("data"))

def copied(leaf, place):  # keys by their bits
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return put(jax.device_get(leaf), place)
    return jax.random.wrap_key_data(put(jax.device_get(jax.random.key_data(leaf)), place))


for name, function, s, place in (
    ("jit", network, msbp.memorized(msbp.top_k(k=7, rows_per_group=4), decay=0.8), whole),
    ("whole batch", network, msbp.memorized(msbp.top_k(k=7, rows_per_group=None), decay=0.8), whole),
    ("local", network, msbp.memorized(msbp.top_k(k=7, rows_per_group=None), decay=0.8, reduce="local"), rows),
    ("shard_map", mapped, msbp.memorized(msbp.top_k(k=7, rows_per_group=4), decay=0.8), whole),
    ("rows", network, msbp.sample_rows(density=0.25), whole),
    ("rows in shard_map", mapped, {"*": msbp.sample_rows(density=0.25)}, whole),
):
    f = msbp.sparse_vjp(function, s)
    memory = jax.tree.map(lambda leaf: copied(leaf, place), jax.jit(lambda: f.init_memory(params, data))())

    @jax.jit
    def step(params, memory, x):
        loss, grads, memory = msbp.value_and_grad(lambda p, m, x: (f(p, x, memory=m) ** 2).mean())(params, memory, x)
        return jax.tree.map(lambda p, g: p - g, params, grads), memory, loss

    p, x = put(params, whole), put(data, rows)
    for _ in range(3):
        p, memory, loss = step(p, memory, x)
    numbers = [leaf for leaf in jax.tree.leaves(memory) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    total = jax.jit(lambda m: sum(jnp.abs(leaf).sum() for leaf in m))(numbers)
    with open(sys.argv[4], "a") as results:
        print(f"{name}: {float(loss):.6f} {float(jnp.abs(p['w']).sum()):.4f} {float(total):.6f}", file=results)
"""


def _start(process, processes, address, results):
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    command = [sys.executable, "-c", PROGRAM, str(process), str(processes), address, str(results)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # Results come in files: the library that joins the processes writes to their outputs when it likes.
    files = [tmp_path / name for name in ("one", "first of two", "second of two")]
    places = [(0, 1, ""), (0, 2, address), (1, 2, address)]
    started = [_start(*place, file) for place, file in zip(places, files, strict=True)]
    said = [process.communicate(timeout=240)[1] for process in started]  # all end before one is looked at
    for process, errors in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-2000:]
    one, *two = [[line.split(": ") for line in file.read_text().splitlines()] for file in files]
    assert [name for name, _ in one] == ["jit", "whole batch", "local", "shard_map", "rows", "rows in shard_map"]
    assert two[0] == two[1]
    for (name, want), (_, got) in zip(one, two[0], strict=True):
        assert [float(v) for v in got.split()] == pytest.approx([float(v) for v in want.split()], rel=1e-4), name
