"""All parts of the suite, in the order in which they run and are written down."""

from __future__ import annotations

from benchmarks.suite import (
    choice,
    compile_time,
    convolutions,
    devices,
    entries,
    freed_memory,
    kept_images,
    layers,
    layout,
    predictions,
    rows,
    selection,
    sparse_convolutions,
    step_costs,
    step_memory,
    steps,
    weights,
)
from benchmarks.suite.context import Part

PARTS = {
    "layers": Part(
        "backward of one layer over shapes, densities and groups: each backend, dense XLA, PyTorch",
        7,
        layers.measure,
    ),
    "targets": Part(
        "backward of one layer, only dense and what is chosen, at the settings the project set itself",
        21,
        layers.measure_targets,
    ),
    "select": Part(
        "the selection alone, over the time of reading the gradient once, on three kinds of gradients",
        11,
        selection.measure,
        records=True,
    ),
    "gradients": Part(
        "backward of one layer at density 0.04 on three kinds of gradients",
        5,
        layers.measure_gradients,
        records=True,
    ),
    "layout": Part(
        "the products with weights [in, out], as Flax has them, over the same with [out, in]",
        7,
        layout.measure,
    ),
    "rows": Part("dx and dw of the rows that are kept, over densities: native, XLA, dense", 21, rows.measure),
    "padding": Part(
        "steps that skip rows of zeros, of batches with many of them and with none", 21, rows.measure_steps
    ),
    "devices": Part(
        "data-parallel steps, dense and by rows, over eight virtual devices and two processes", 11, devices.measure
    ),
    "entries": Part("dithering, and dx and dw of the entries that are left, over shares of zeros", 21, entries.measure),
    "weights": Part("forward and backward of a layer with sparse weights, over densities", 11, weights.measure),
    "weight steps": Part("steps of networks with sparse weights, over densities", 21, weights.measure_steps),
    "sparse conv": Part(
        "forward and backward of convolutions with sparse kernels, over densities", 5, sparse_convolutions.measure
    ),
    "sparse conv steps": Part(
        "a step of a ResNet-18 with sparse kernels, over densities", 5, sparse_convolutions.measure_steps
    ),
    "kept images": Part(
        "backward of dense convolutions on the images that are kept, over their share", 7, kept_images.measure
    ),
    "steps": Part(
        "whole training steps: networks, optimizers, the bound of Amdahl's law, PyTorch",
        7,
        steps.measure,
    ),
    "freed memory": Part(
        "steps with freed memory kept by the process and without, in processes of their own", 5, freed_memory.measure
    ),
    "step costs": Part("pieces of steps, from which the cost model of whole steps is made", 9, step_costs.measure),
    "predictions": Part(
        "whole steps of networks that the cost model was not fitted to, and what it says of them",
        9,
        predictions.measure,
    ),
    "memory": Part("what a compiled step holds at its peak", 1, step_memory.measure),
    "choice": Part(
        "every path of the products on a grid, and what the automatic choice takes of it",
        7,
        choice.measure,
    ),
    "compile": Part("tracing and compiling a 12-layer step", 5, compile_time.measure),
    "conv": Part("backward of convolutions of a ResNet-18", 7, convolutions.measure),
    "transformer": Part(
        "a training step of a larger transformer at density 0.1",
        5,
        steps.measure_transformer,
    ),
}


def place(name: str) -> tuple[int, str]:
    """Return where a part stands among all, by which to sort; a suffix comes behind the part it belongs to."""
    before = [i for i, part in enumerate(PARTS) if name.startswith(part)]
    return (before[0] if before else len(PARTS)), name
