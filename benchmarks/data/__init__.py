"""Real data from a folder, and something small to run on without one; `benchmarks` and `studies` share it.

The demo, which is part of the package, and the examples, each a file of its own, read the same formats by themselves.
"""
