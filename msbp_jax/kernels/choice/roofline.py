"""Expected times on GPUs and TPUs: operations over the chip's published rate, and bytes over its published bandwidth.

They put the paths of a layer into an order and tell a layer that gains from one that loses. What the GPU kernels and
XLA's gathers reach of those rates was measured on one H200 (`python -m benchmarks.accelerator`, 2026-11-28), and is
taken to be the same share of the rates of other GPUs. Nothing was measured on a TPU.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msbp_jax.kernels.choice.layer import Layer
from msbp_jax.kernels.choice.target import Device


class Chip(NamedTuple):
    """Published rates.

    Attributes:
      operations: Dense bfloat16 operations a second.
      bytes_moved: Bytes of main memory read or written a second.
    """

    operations: float
    bytes_moved: float


# By a part of JAX's name of the device; the first match counts.
CHIPS: Final = {
    "H200": Chip(989e12, 4.8e12),
    "H100": Chip(989e12, 3.35e12),
    "A100": Chip(312e12, 2.04e12),
    "B200": Chip(2250e12, 8e12),
    "TPU v5 lite": Chip(197e12, 0.82e12),
    "TPU v5": Chip(459e12, 2.77e12),
    "TPU v6": Chip(918e12, 1.64e12),
    "TPU7x": Chip(1154e12, 3.7e12),  # one of the two cores that JAX shows
}
_OTHERS: Final = {"gpu": CHIPS["A100"], "tpu": CHIPS["TPU v5 lite"]}

# The share of the published rate that a matrix product reaches: XLA's, and that of this package's kernels.
XLA_REACHES, _KERNELS_REACH = 0.75, 0.6
CALL_SECONDS = 5e-6
# On an H200: the rate of rows that the GPU kernels gather and add up, over main memory's bandwidth; how many times as
# long as their bytes say XLA's gathers take; how often a selection reads the gradient; and bytes that would take as
# long as XLA takes to sort a score.
_GATHERED_SPEED, _XLA_GATHERS = 0.54, 6.0
_SELECTION_READS, _SORTED = 6, 340
_ENTRY = 2  # bytes of an entry: bfloat16
_SUM = 4  # bytes of a sum: float32
# Seconds on a TPU to start the copy of a row of wᵀ, and to add a row of 1,024 numbers to a tile of dw.
_COPY_SECONDS, _ADD_SECONDS = 2e-8, 4e-9


def known(device: Device) -> bool:
    """Whether the rates of a device are in the table."""
    return any(name in device.kind for name in CHIPS)


def chip(device: Device) -> Chip:
    """Return the rates of a device, or those of an older chip of its platform if they are not known."""
    return next((rates for name, rates in CHIPS.items() if name in device.kind), _OTHERS[device.platform])


def seconds(path: str, device: Device, layer: Layer) -> float:
    """Return the expected time of both products of a layer's backward, or of its selection.

    Args:
      path: "plain" (a dense backward), "dense" (the same, on a sparse gradient), "xla", "gpu", "tpu", or "select".
      device: What it runs on.
      layer: Sizes.
    """
    rows, m, n, k, rows_per_group = layer
    groups = layer.groups
    gathered = groups * k * m
    on_tpu = device.platform == "tpu"
    # Tiles have at least 16 rows, and XLA's batched products at least as many on a TPU's matrix unit.
    least = max(rows_per_group, 16) / rows_per_group
    sparse = 4 * rows * k * m * least
    arrays = _ENTRY * (2 * rows * m + 2 * m * n)
    moved: float
    work: tuple[float, float, float]
    match path:
        case "plain" | "dense":
            written = 3 * _ENTRY * rows * n if path == "dense" else 0
            work = 4 * rows * m * n / XLA_REACHES, arrays + _ENTRY * rows * n + written, 0.0
        case "xla":
            # The gathered block of wᵀ is written and read; so are the products that make dw, and their sums.
            slower = _XLA_GATHERS if groups > 1 and not on_tpu else 1.0
            moved = gathered * (2 * _ENTRY + (0 if groups == 1 else 4 * _SUM)) * slower + _ENTRY * m * n
            work = sparse / XLA_REACHES, arrays + moved + (0 if groups == 1 else 3 * _SUM * m * n), 0.0
        case "gpu":
            # wᵀ is transposed; rows of it are gathered and, of several groups, products are added up to make dw.
            passes = 0 if groups == 1 else (-(-rows_per_group // 128) + 2) / _GATHERED_SPEED
            moved = gathered * passes * _ENTRY + 2 * _ENTRY * m * n
            work = sparse / _KERNELS_REACH, arrays + moved, 0.0
        case "tpu":
            tiles = -(-rows_per_group // 256)
            copies, adds = groups * k * -(-m // 8192) * tiles, groups * k * -(-m // 1024) * tiles
            moved = gathered * _ENTRY * tiles + 4 * _ENTRY * m * n
            work = sparse / _KERNELS_REACH, arrays + moved, copies * _COPY_SECONDS + adds * _ADD_SECONDS
        case _:
            moves = 1024 * rows * n if on_tpu and rows_per_group >= 16 else 0  # entries through the matrix unit
            reads = 2 if on_tpu else _SELECTION_READS
            scores = 8 * _SUM if on_tpu or rows_per_group >= 16 else _SORTED  # the GPU's kernel, or a sort
            work = moves, reads * _ENTRY * rows * n + 2 * _ENTRY * rows * k + scores * groups * n, 0.0
    operations, moved, other = work
    rates = chip(device)
    return CALL_SECONDS + operations / rates.operations + moved / rates.bytes_moved + other
