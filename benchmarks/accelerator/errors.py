"""Errors of both products, relative to the largest entry, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.layers import arrays
from benchmarks.accelerator.setting import Setting
from benchmarks.helpers.records import Row
from msbp_jax import kernels
from msbp_jax.testing import dense_products


def measure(setting: Setting) -> Iterator[Row]:
    """Yield, for each backend, the largest error of both products; on a CPU the kernels are interpreted."""
    rows, m, n = setting.checked
    platform = jax.default_backend()
    platforms = ("gpu", "tpu") if platform == "cpu" else (platform,)
    for dtype, precision in ((jnp.bfloat16, None), (jnp.float32, "highest")):
        g, x, w = arrays(rows, m, n, dtype)
        for backend in ("xla", *platforms):
            p = kernels.select(g, n // 16, min(rows, 128), backend=backend)
            true = dense_products(p, x, w, 1)
            dx, dw = jax.jit(
                lambda p, x, w, b=backend, precision=precision: (
                    kernels.grad_input(p, w, 1, precision=precision, backend=b),
                    kernels.grad_weight(p, x, 1, precision=precision, backend=b),
                )
            )(p, x, w)
            error = [
                float(np.abs(got - want).max() / np.abs(want).max()) for got, want in zip((dx, dw), true, strict=True)
            ]
            names = {"dtype": jnp.dtype(dtype).name, "backend": backend}
            yield names | {"dx": f"{error[0]:.1e}", "dw": f"{error[1]:.1e}"}
