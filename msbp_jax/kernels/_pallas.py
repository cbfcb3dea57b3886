"""Calling a Pallas kernel: on its platform compiled, on a CPU interpreted, for whoever asks for it by name.

Around every call stand the same things: the types that `shard_map` checks, a rule by which XLA may split it over
devices, and an error for a second derivative, which these kernels do not have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._compat import pallas
from msbp_jax.formats import Columns
from msbp_jax.kernels import _partition, _platform
from msbp_jax.kernels._derivative import without_derivative

DTYPES: Final = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))

# What a TPU kernel may use of the fast memory beside the matrix unit: the smallest of the generations has 64 MiB.
VMEM_BYTES: Final = 48 * 2**20
_VMEM: Final = _compat.pallas_tpu.VMEM

_MADE_FOR: Final = {"tpu": ("TPU v5", "TPU v6", "TPU7x"), "gpu": ("NVIDIA",)}

# How a kernel runs where its platform is not at hand. Tests put `InterpretParams(detect_races=True)` here.
INTERPRET: dict[str, Any] = {"tpu": True, "gpu": True}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What is static about a call; see `jax.experimental.pallas.pallas_call`.

    Attributes:
      body: The kernel.
      name: Its name in the compiled program.
      platform: "gpu" or "tpu".
      results: Shape and dtype of each result.
      grid: How often it runs, along each axis.
      params: The platform's `CompilerParams`.
      in_specs: A `BlockSpec` for each operand; None for whole arrays.
      out_specs: A `BlockSpec` for each result; None for whole arrays.
      scratch: Scratch memory.
      aliases: Which operand's memory becomes which result's.
      operations: Floating-point operations.
      bytes_moved: Bytes read and written, for XLA's scheduler and for cost analysis; the arrays' sizes by default.
    """

    body: Callable[..., None]
    name: str
    platform: str
    results: Sequence[tuple[tuple[int, ...], Any]]
    grid: tuple[int, ...]
    params: Any
    in_specs: Sequence[Any] | None = None
    out_specs: Sequence[Any] | None = None
    scratch: Sequence[Any] = ()
    aliases: Mapping[int, int] = dataclasses.field(default_factory=dict)
    operations: int = 0
    bytes_moved: int | None = None

    def __call__(self, *operands: jax.Array) -> list[jax.Array]:
        """Return the results of the kernel."""
        alike, varies, _ = _compat.varying_alike(operands)
        interpret = False if _platform.platform() == self.platform else INTERPRET[self.platform]
        if varies and interpret:
            return _compat.call_varying(functools.partial(self._call, interpret), alike)
        return self._call(interpret, *alike)

    def fast_memory(self, operands: Sequence[jax.Array]) -> int:
        """Return the bytes of a TPU's fast memory that the call takes: blocks twice, as they are copied ahead."""
        arrays: list[Any] = [*operands, *_avals(self.results)]
        specs = zip([*(self.in_specs or ()), *(self.out_specs or ())], arrays, strict=True)
        blocks = [(spec.block_shape, array.dtype) for spec, array in specs if spec.memory_space is None]
        scratch = [(memory.shape, memory.dtype) for memory in self.scratch if memory.memory_space == _VMEM]
        return sum(2 * _tiled_bytes(*block) for block in blocks) + sum(_tiled_bytes(*block) for block in scratch)

    def _call(self, interpret: Any, *operands: jax.Array) -> list[jax.Array]:
        if self.platform == "tpu" and (needed := self.fast_memory(operands)) > VMEM_BYTES:
            raise NotImplementedError(f"{self.name} would take {needed} bytes of fast memory, of {VMEM_BYTES}")
        self.body.__name__ = self.name  # by which a GPU's profiler knows it
        arrays = [*self.results, *((operand.shape, operand.dtype) for operand in operands)]
        moved = self.bytes_moved or sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in arrays)
        function = pallas.pallas_call(
            self.body,
            out_shape=[_compat.typed_like(operands[0], shape, dtype) for shape, dtype in self.results],
            grid=self.grid,
            in_specs=self.in_specs or pallas.no_block_spec,
            out_specs=self.out_specs or pallas.no_block_spec,
            scratch_shapes=self.scratch,
            input_output_aliases=dict(self.aliases),
            compiler_params=self.params,
            cost_estimate=pallas.CostEstimate(flops=self.operations, bytes_accessed=moved, transcendentals=0),
            interpret=interpret,
            name=self.name,
        )
        return list(function(*operands))


def _avals(results: Sequence[tuple[tuple[int, ...], Any]]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(*result) for result in results]


def _tiled_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Return the bytes of a block, whose last two axes are filled up to a register's rows and lanes."""
    *front, rows, lanes = (1, *shape)
    return math.prod(front) * -(-rows // 8) * 8 * -(-lanes // 128) * 128 * jnp.dtype(dtype).itemsize


def check(platform: str, *dtypes: Any) -> None:
    """Decline what the kernels do not do.

    Args:
      platform: Theirs, "gpu" or "tpu".
      *dtypes: Of what they read and write; None is whatever they like.

    Raises:
      NotImplementedError: Another device, or a dtype other than float32 and bfloat16.
    """
    here = _platform.target()
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


def check_product(platform: str, cotangent: Columns, other: jax.Array, dtype: Any) -> None:
    """Decline what the kernels do not do, for a product that is to be written in `dtype`."""
    check(platform, other.dtype, cotangent.values.dtype if cotangent.scale is None else None, dtype)


def run(
    op: str,
    function: Callable[[_partition.Shapes], _partition.Call],
    operands: Sequence[jax.Array],
    results: _partition.Shapes,
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
      choose_together: What a selection does where devices have parts of its one group; see `_partition`.

    Raises:
      NotImplementedError: On several TPUs outside `shard_map`; when it is differentiated.
    """
    alike, varies, _ = _compat.varying_alike(operands)
    if varies or _compat.all_axes_manual() or jax.device_count() == 1 or not _splits_here():
        call = function(results)
    elif _platform.platform() == "tpu":
        raise NotImplementedError(
            f"{op}: JAX cannot split a TPU kernel over the {jax.device_count()} devices of a jit-compiled program "
            "(github.com/jax-ml/jax/issues/38196). Inside jax.shard_map it runs; elsewhere XLA serves."
        )
    else:
        key, rows, group = split
        call = _partition.partitioned(_partition.SPLITS[key], rows, group, results, function, choose_together)
    return list(without_derivative(op, "Pallas", call)(*alike))


def _splits_here() -> bool:
    return all(how is True for how in INTERPRET.values())  # the simulator of a device cannot be split over several


def parts(cotangent: Columns) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return values, index and scale, which is 1 where there is none."""
    scale = cotangent.scale
    return cotangent.values, cotangent.index, jnp.ones(cotangent.values.shape[:1]) if scale is None else scale


def common_dtype(values: Any, other: Any) -> jnp.dtype:
    """Return the dtype that values and a weight or inputs are multiplied in; 8-bit values fit that of the other."""
    return jnp.dtype(jnp.float32) if values == jnp.float32 else jnp.dtype(other)


def matmul_precision(precision: Any) -> Any:
    """Return a precision of `lax.dot_general` as a kernel takes it.

    Raises:
      NotImplementedError: An algorithm, or one that differs between the operands.
    """
    if isinstance(precision, tuple | list):
        if len(set(precision)) > 1:
            raise NotImplementedError(f"the kernels take one precision for both operands, got {precision}")
        precision = precision[0]
    if precision is None:
        return None
    try:
        known = jax.lax.Precision(precision)
    except ValueError:
        raise NotImplementedError(f"the kernels take the precisions of jax.lax.Precision, got {precision}") from None
    return jax.lax.Precision.DEFAULT if known == jax.lax.Precision.DEFAULT else jax.lax.Precision.HIGHEST


def tpu_params(*semantics: Literal["parallel", "arbitrary"]) -> Any:
    """Return the parameters of a TPU kernel: for each axis of its grid, "parallel" or "arbitrary" for in order."""
    return _compat.pallas_tpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


def triton_params(warps: int, stages: int) -> Any:
    """Return the parameters of a GPU kernel: warps of a program, and stages in which its loops are pipelined.

    Raises:
      NotImplementedError: This JAX has no Triton.
    """
    if _compat.pallas_triton is None:
        raise NotImplementedError("the gpu kernels need Pallas-Triton, which this version of JAX no longer has")
    return _compat.pallas_triton.CompilerParams(num_warps=warps, num_stages=stages)


def power_of_two(size: int, largest: int) -> int:
    """Return the size of a GPU tile that covers `size`: a power of two from 16 on, which a matrix unit wants."""
    return min(largest, max(16, pallas.next_power_of_2(size)))


def padded(array: jax.Array, *sizes: int, mode: str = "constant") -> jax.Array:
    """Return an array filled up at the end of each axis to multiples of `sizes`; as it is if it fits."""
    missing = [(0, -size % multiple) for size, multiple in zip(array.shape, sizes, strict=True)]
    return jnp.pad(array, missing, mode=mode) if any(after for _, after in missing) else array


def tile_of(size: int, largest: int, multiple: int) -> int:
    """Return the size of equal tiles, multiples of `multiple` and at most `largest`, that cover `size` tightly."""
    tiles = -(-size // largest)
    exact = (size // count for count in range(tiles, 2 * tiles + 1) if size % (count * multiple) == 0)
    if (found := next(exact, None)) is not None:
        return found
    return -(-size // (tiles * multiple)) * multiple
