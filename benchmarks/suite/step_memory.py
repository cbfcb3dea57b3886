"""What a compiled step holds at its peak, by the program's own analysis."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import optax

from benchmarks.helpers.networks import problem, step_of
from benchmarks.helpers.records import Row
from benchmarks.suite.context import Context
from benchmarks.suite.steps import methods, networks


def measure(context: Context) -> Iterator[Row]:
    """Yield, for each network, the bytes of a step by each method, and its temporaries over those of dense."""
    tx = optax.adam(1e-3)
    for setting in networks(context):
        row: Row = {"network": setting.name}
        temporary = {}
        for method, sparsifier in methods(setting).items():
            gradients, params, memory = problem(setting, sparsifier)
            state = (params, memory, tx.init(params))
            compiled = jax.jit(step_of(tx, gradients), donate_argnums=0).lower(state, setting.x, setting.y).compile()
            analysis = compiled.memory_analysis()
            if analysis is None:
                raise RuntimeError("XLA does not say here what a program holds.")
            temporary[method] = analysis.temp_size_in_bytes
            row[f"{method}_MiB"] = round((analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) / 2**20, 1)
        row["temporaries MSBP/dense"] = round(temporary["MSBP"] / temporary["dense"], 2)
        row["temporaries MSBP r=1/dense"] = round(temporary["MSBP r=1"] / temporary["dense"], 2)
        yield row
