"""What this chip copies and multiplies, and the floor that follows for a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from benchmarks.accelerator.setting import Setting, milliseconds
from benchmarks.helpers.records import Row


def measure(setting: Setting) -> Iterator[Row]:
    """Yield bytes copied and operations multiplied in a second."""
    source = jnp.ones(setting.copied, jnp.bfloat16)
    a = jnp.ones((setting.multiplied, setting.multiplied), jnp.bfloat16)
    copy, multiply = jax.jit(lambda x: x + jnp.bfloat16(1)), jax.jit(jnp.matmul)
    found = milliseconds({"copy": lambda: copy(source), "multiply": lambda: multiply(a, a)}, setting)
    yield {
        "copied, TB/s": float(f"{2 * source.nbytes / found['copy'] / 1e9:.4g}"),
        "multiplied, TFLOP/s": float(f"{2 * setting.multiplied**3 / found['multiply'] / 1e9:.4g}"),
    }


def floor(rows: int, m: int, n: int, k: int, rates: Mapping[str, float]) -> float:
    """Return the least milliseconds of a backward: every array once, and the operations of what is kept."""
    copied, multiplied = rates["copied, TB/s"] * 1e9, rates["multiplied, TFLOP/s"] * 1e9
    product = 2 * rows * k * m / multiplied
    select = 2 * rows * n / copied
    dx, dw = (2 * (rows * k + m * n + rows * m) / copied for _ in range(2))
    return select + max(dx, product) + max(dw, product)
