"""One kernel: what is static about its call, compiled on its platform and interpreted elsewhere, for who names it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from msbp_jax import _compat
from msbp_jax._compat._pallas import pallas, pallas_tpu, pallas_triton
from msbp_jax.kernels.choice import target

# What a TPU kernel may use of the fast memory (VMEM): the generation with the least has 64 MiB.
VMEM_BYTES: Final = 48 * 2**20
_VMEM: Final = pallas_tpu.VMEM

# How a kernel is interpreted where its platform is missing. Tests put `InterpretParams(detect_races=True)` here.
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
        interpret = False if target.platform() == self.platform else INTERPRET[self.platform]
        if varies and interpret:
            return _compat.call_varying(functools.partial(self._call, interpret), alike)
        return self._call(interpret, *alike)

    def fast_memory(self, operands: Sequence[jax.Array]) -> int:
        """Return the bytes of a TPU's fast memory that the call takes: blocks twice, as they are copied ahead."""
        arrays: list[Any] = [*operands, *_avals(self.results)]
        specs = zip([*(self.in_specs or ()), *(self.out_specs or ())], arrays, strict=True)
        blocks = [(spec.block_shape, array.dtype) for spec, array in specs if spec.memory_space is None]
        scratch = [(buffer.shape, buffer.dtype) for buffer in self.scratch if buffer.memory_space == _VMEM]
        return sum(2 * _tiled_bytes(*block) for block in blocks) + sum(_tiled_bytes(*block) for block in scratch)

    def _call(self, interpret: Any, *operands: jax.Array) -> list[jax.Array]:
        if self.platform == "tpu" and (needed := self.fast_memory(operands)) > VMEM_BYTES:
            raise NotImplementedError(f"{self.name} would take {needed} bytes of fast memory, of {VMEM_BYTES}")
        self.body.__name__ = self.name  # what a GPU's profiler shows
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
    """Return the bytes of a block, whose last two axes are padded to a register's rows and lanes."""
    *front, rows, lanes = (1, *shape)
    return math.prod(front) * -(-rows // 8) * 8 * -(-lanes // 128) * 128 * jnp.dtype(dtype).itemsize


def tpu_params(*semantics: Literal["parallel", "arbitrary"]) -> Any:
    """Return the parameters of a TPU kernel: for each axis of its grid, "parallel" or "arbitrary" for in order."""
    return pallas_tpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


def triton_params(warps: int, stages: int) -> Any:
    """Return the parameters of a GPU kernel: warps of a program, and stages in which its loops are pipelined.

    Raises:
      NotImplementedError: This JAX has no Triton.
    """
    if pallas_triton is None:
        raise NotImplementedError("the gpu kernels need Pallas-Triton, which this version of JAX no longer has")
    return pallas_triton.CompilerParams(num_warps=warps, num_stages=stages)
