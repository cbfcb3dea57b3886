"""Compile the kernels and a training step for chips that this machine has not; prints a JSON line for each program.

python tests/kernels/ahead_of_time.py tpu    # libtpu
python tests/kernels/ahead_of_time.py gpu    # jax-cuda13-plugin

A process of its own: the compilers want their settings in the environment before they are loaded.
"""

import functools
import json
import os
import re
import sys
import time
import warnings

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

import msbp_jax as msbp
from msbp_jax import kernels
from msbp_jax.kernels import weights
from msbp_jax.weights import pattern_of

TPUS = {
    "v5e": ("TPU v5 lite", "v5e:2x2"),
    "v5p": ("TPU v5", "v5p:2x2x1"),
    "v6e": ("TPU v6 lite", "v6e:2x2"),
    "tpu7x": ("TPU7x", "tpu7x:2x2x1"),
}
# Name, compute capability, cores, shared memory of a core and of a block, second-level cache, bytes a second, memory.
GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 233472, 232448, 52428800, 3352320000000, 84942979072),
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 167936, 166912, 41943040, 2039040000000, 85100068864),
}


def gpu_config(name, capability, cores, shared_core, shared_block, cache, bandwidth, memory):
    """Return the description of a GPU as XLA reads it."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": shared_core,
        "shared_memory_per_block_optin": shared_block,
        "core_count": cores,
        "fpus_per_core": 128 if capability == 9 else 64,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": bandwidth,
        "l2_cache_size": cache,
        "device_memory_size": memory,
        "clock_rate_ghz": 1.98 if capability == 9 else 1.41,
    }
    fields = " ".join(f"{key}: {value}" for key, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {capability} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"'
    )


def devices(chip):
    """Return the name of a chip and some devices of it, which are not there."""
    if chip in TPUS:
        name, topology = TPUS[chip]
        return name, topologies.get_topology_desc(topology, "tpu").devices
    config = gpu_config(*GPUS[chip])
    return GPUS[chip][0], topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices


def programs(platform, all_of_them, of_xla):
    """Yield name, function and shapes of each program.

    Other sizes, another layout and vmap come only with `all_of_them`; products that are XLA's own with `of_xla`.
    """
    options = {"backend": platform}
    sizes = [(jnp.bfloat16, 8192, 8192, 8192, 512, 128), (jnp.float32, 300, 500, 1000, 77, 30)]
    for dtype, rows, m, n, k, group in sizes if all_of_them else sizes[:1]:
        groups, size = -(-rows // group), f"{jnp.dtype(dtype).name} {rows}x{m}x{n}"
        shape = jax.ShapeDtypeStruct
        p = msbp.Columns(shape((groups, group, k), dtype), shape((groups, k), jnp.int32), (rows, n))
        g, x = shape((rows, n), dtype), shape((rows, m), dtype)
        select = lambda g, m, a=(k, group): kernels.select_with_memory(g, m, *a, **options)
        yield f"select_with_memory, {size}", select, (g, shape((n,), jnp.float32))
        by_slot = lambda g, m, a=(k, group): kernels.select_with_memory(g, m, *a, **options)
        if rows < 1000:
            yield f"select_with_memory by slot, {size}", by_slot, (g, shape((rows, n), jnp.float32))
            yield f"select, {size}", lambda g, a=(k, group): kernels.select(g, *a, **options), (g,)
        for axis in (0, 1) if all_of_them else (1,):
            to = {"dtype": dtype, **options}
            w = shape((n, m) if axis == 0 else (m, n), dtype)
            dx = lambda p, w, axis=axis, to=to: kernels.grad_input(p, w, axis, **to)
            dw = lambda p, x, axis=axis, to=to: kernels.grad_weight(p, x, axis, **to)
            yield f"grad_input, axis {axis}, {size}", dx, (p, w)
            yield f"grad_weight, axis {axis}, {size}", dw, (p, x)
    if all_of_them:
        shape = jax.ShapeDtypeStruct
        levels = msbp.Columns(
            shape((4, 128, 64), jnp.int8), shape((4, 64), jnp.int32), (512, 512), False, shape((4,), jnp.float32)
        )
        both = lambda p, w: (kernels.grad_input(p, w, 1, **options), kernels.grad_weight(p, w, 1, **options))
        yield "int8 values with a scale", both, (levels, shape((512, 512), jnp.bfloat16))
        yield "mapped", *mapped(options)
    if of_xla:
        yield "8 bits", *in_8_bits()
        yield "tiles", *in_tiles()
    yield "step", *training_step(platform)


def in_8_bits():
    """Return the backward of a dithered gradient in 8 bits, and its shapes."""

    def backward(levels, scale, x, w):
        p = msbp.Entries(levels, scale, bits=8, dtype=x.dtype)
        return kernels.grad_input(p, w, 1, dtype=x.dtype), kernels.grad_weight(p, x, 1, dtype=x.dtype)

    shape = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)
    bf16 = jnp.bfloat16
    shapes = shape(jnp.int8, 1024, 2048), shape(jnp.float32), shape(bf16, 1024, 512), shape(bf16, 512, 2048)
    return backward, shapes


def in_tiles():
    """Return forward and backward of a layer whose weight has blocks of entries, and its shapes."""
    mask = np.arange(32 * 64).reshape(32, 64) % 7 == 0
    pattern = pattern_of(mask.repeat(16, 0).repeat(16, 1), block=(16, 16))

    def both(x, values, g):
        y = weights.times(x, values, pattern, False, backend="tiles")
        return (
            y,
            weights.times(g, values, pattern, True, backend="tiles"),
            weights.gradient(x, g, pattern, backend="tiles"),
        )

    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)
    return both, (shape(256, 512), shape(pattern.entries), shape(256, 1024))


def mapped(options):
    """Return a backward under vmap, as experts have it, and its shapes."""

    def backward(g, x, w, m):
        p, m, _ = kernels.select_with_memory(g, m, 40, 32, **options)
        return kernels.grad_input(p, w, 1, **options), kernels.grad_weight(p, x, 1, **options), m

    shape = lambda *size: jax.ShapeDtypeStruct((3, *size), jnp.float32)
    return jax.vmap(backward), (shape(128, 384), shape(128, 256), shape(256, 384), shape(384))


class Block(nn.Module):
    """A layer of a network."""

    @nn.compact
    def __call__(self, x, _):
        """Return the layer's output."""
        return x + nn.Dense(512, dtype=jnp.bfloat16)(x), None


def training_step(platform):
    """Return a whole training step, through scan and remat, and its shapes."""
    scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    spec = msbp.memorized(msbp.top_k(density=1 / 8, rows_per_group=128), decay=0.8)
    net = msbp.sparse_vjp(scanned(), spec, backend=platform)
    tx = optax.adamw(1e-3)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    params = jax.eval_shape(lambda key, x: net.init(key, x, None), jax.random.key(0), x)
    memory = jax.eval_shape(lambda p, x: net.init_memory(p, x, None), params, x)

    def loss(params, memory, x, y):
        return jnp.mean((net.apply(params, x, None, memory=memory)[0] - y).astype(jnp.float32) ** 2)

    def step(params, opt_state, memory, x, y):
        value, gradients, memory = msbp.value_and_grad(loss)(params, memory, x, y)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, memory, value

    return step, (params, jax.eval_shape(tx.init, params), memory, x, x)


def on_four_chips(chip):
    """Return a backward inside `shard_map`, its varying axes checked, and its shapes, sharded over four chips."""
    mesh = jax.sharding.Mesh(np.array(devices(chip)[1][:4]), ("d",))
    split, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()

    def body(g, x, w, m):
        p, m, _ = kernels.select_with_memory(g, m, 128, 128, backend="tpu")
        dx = kernels.grad_input(p, w, 1, backend="tpu")
        return dx, jax.lax.psum(kernels.grad_weight(p, x, 1, backend="tpu"), "d"), jax.lax.psum(m, "d")

    specs = (split, split, whole, whole)
    function = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(split, whole, whole), check_vma=True)
    sizes = ((4096, 1024), (4096, 512), (512, 1024), (1024,))
    return function, tuple(
        jax.ShapeDtypeStruct(size, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
        for size, spec in zip(sizes, specs, strict=True)
    )


def for_one(chip, function, shapes):
    """Return the lowered program of a function for one chip."""
    name, there = devices(chip)
    sharding = jax.sharding.SingleDeviceSharding(there[0])
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    platform = "tpu" if chip in TPUS else "gpu"
    device = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).lower(*placed)


def compiled(lower):
    """Return what compiling a program says."""
    start = time.perf_counter()
    program = lower().compile()
    cost = program.cost_analysis() or {}
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "operations": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "kernels": sorted(set(re.findall(r"msbp_(?!jax)\w+", program.as_text()))),
        # Matrix products whose result is in whole numbers.
        "whole_products": len(re.findall(r"= s32\[[^=]* (?:dot|convolution)\(", program.as_text())),
    }


def main(platform):
    """Compile everything for every chip of a platform."""
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    chips = TPUS if platform == "tpu" else GPUS
    first, *_, last = chips
    for chip in chips:
        for name, function, shapes in programs(platform, chip == first, chip in (first, last)):
            report(chip, name, functools.partial(for_one, chip, function, shapes))
        if platform == "tpu":
            function, shapes = on_four_chips(chip)
            report(chip, "shard_map", functools.partial(jax.jit(function).lower, *shapes))


def report(chip, name, lower):
    """Print a line about a program."""
    print(json.dumps({"chip": chip, "program": name, **compiled(lower)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
