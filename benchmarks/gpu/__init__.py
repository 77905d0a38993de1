"""The benchmark on a GPU: `python -m benchmarks --device cuda`. It has not been run on one yet."""
