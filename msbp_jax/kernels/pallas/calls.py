"""Around every Pallas kernel: what it declines, the types that `shard_map` checks, a rule by which XLA may split it.

And an error for a second derivative, which these kernels do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax.kernels.choice import target
from msbp_jax.kernels.opaque import partition
from msbp_jax.kernels.opaque.derivative import without_derivative
from msbp_jax.kernels.pallas import kernel

DTYPES: Final = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))

_MADE_FOR: Final = {"tpu": ("TPU v5", "TPU v6", "TPU7x"), "gpu": ("NVIDIA",)}


def check(platform: str, *dtypes: Any) -> None:
    """Decline what the kernels do not do.

    Args:
      platform: Theirs, "gpu" or "tpu".
      *dtypes: Of what they read and write; None is whatever they like.

    Raises:
      NotImplementedError: Another device, or a dtype other than float32 and bfloat16.
    """
    here = target.device()
    if here.platform not in (platform, "cpu"):
        raise NotImplementedError(
            f"the {platform} kernels run on {platform.upper()}, and the program is for {here.platform}"
        )
    if here.platform == platform and not any(name in here.kind for name in _MADE_FOR[platform]):
        raise NotImplementedError(
            f"the {platform} kernels are made for {', '.join(_MADE_FOR[platform])}, and the program is for {here.kind}"
        )
    for dtype in dtypes:
        if dtype is not None and jnp.dtype(dtype) not in DTYPES:
            raise NotImplementedError(f"the {platform} kernels take float32 and bfloat16, got {jnp.dtype(dtype)}")


def run(
    op: str,
    function: Callable[[partition.Shapes], partition.Call],
    operands: Sequence[jax.Array],
    results: partition.Shapes,
    split: tuple[str, int, int],
    choose_together: Callable[..., tuple[jax.Array, ...]] | None = None,
) -> list[jax.Array]:
    """Run what an op does with its kernels.

    Args:
      op: Its name, for the error.
      function: Makes the call for results of given shapes and dtypes, those of one device.
      operands: Its arrays.
      results: Shape and dtype of each array that it returns.
      split: How it may be split over devices: key of `SPLITS`, rows, and rows that share a choice.
      choose_together: What a selection does where devices have parts of its one group; see `opaque.partition`.

    Raises:
      NotImplementedError: On several TPUs outside `shard_map`; when it is differentiated.
    """
    alike, varies, _ = _compat.varying_alike(operands)
    if varies or _compat.all_axes_manual() or jax.device_count() == 1 or not _splits_here():
        call = function(results)
    elif target.platform() == "tpu":
        raise NotImplementedError(
            f"{op}: JAX cannot split a TPU kernel over the {jax.device_count()} devices of a jit-compiled program "
            "(github.com/jax-ml/jax/issues/38196). Inside jax.shard_map it runs; elsewhere XLA serves."
        )
    else:
        key, rows, group = split
        call = partition.partitioned(partition.SPLITS[key], rows, group, results, function, choose_together)
    return list(without_derivative(op, "Pallas", call)(*alike))


def _splits_here() -> bool:
    """Whether a kernel may be split over devices: the simulator of one cannot."""
    return all(mode is True for mode in kernel.INTERPRET.values())
