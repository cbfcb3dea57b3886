"""All that is to be measured on a GPU or TPU: `python -m benchmarks.accelerator`."""
