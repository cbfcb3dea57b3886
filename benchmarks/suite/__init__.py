"""What `python -m benchmarks` measures: each part is a function from a `Context` to rows, and a line in `parts.py`."""
