"""What is measured, and how: sizes, and the time of calls that a chip takes one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks.helpers import language_model


class Setting(NamedTuple):
    """What is measured."""

    shapes: tuple[tuple[int, int, int], ...] = ((8192, 8192, 8192), (16384, 4096, 16384))
    densities: tuple[float, ...] = (1 / 16, 1 / 4)
    groups: tuple[int | None, ...] = (128, None, 1)
    checked: tuple[int, int, int] = (2048, 1024, 2048)
    rounds: int = 7
    calls: int = 10
    copied: int = 2**29
    multiplied: int = 8192
    model: language_model.Size = language_model.Size()
    backwards: tuple[str, ...] = (
        "dense",
        "top-k",
        "MSBP",
        "MSBP, whole batch",
        "half of the sequences",
        "rows, 1/4 of the words",
        "dithered, 8 bits",
    )
    unbiased: tuple[str, ...] = ("rows 1/16", "rows 1/4", "rows 1/2", "dithered 4", "dithered 4, 8 bits")


SMALL = Setting(
    shapes=((64, 32, 128),),
    densities=(1 / 16,),
    groups=(16, None),
    checked=(32, 16, 64),
    rounds=1,
    calls=1,
    copied=2**10,
    multiplied=64,
    model=language_model.Size(layers=1, width=64, heads=2, length=32, batch=2, steps=2),
    backwards=("dense", "MSBP", "half of the sequences"),
    unbiased=("rows 1/4", "dithered 4, 8 bits"),
)


def milliseconds(calls: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, float]:
    """Return the median time of each call; every round has all of them, each several times in a row."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(setting.rounds + 1):  # the first compiles
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(setting.calls)])
            if number:
                times[name].append((time.perf_counter() - start) / setting.calls)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}
