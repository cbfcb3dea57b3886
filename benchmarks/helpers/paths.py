"""Where results go."""

from __future__ import annotations

import pathlib

RESULTS = pathlib.Path(__file__).parents[1] / "results"
SMALL = pathlib.Path(__file__).parents[2] / "build" / "benchmarks"  # figures of minute sizes are none; Git ignores them
