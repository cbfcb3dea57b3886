"""Experiments: what networks reach with a sparse backward, where `benchmarks` measures what it costs.

`python -m studies --help`.
"""
