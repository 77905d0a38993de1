"""The benchmark on a GPU: `python -m benchmarks --device cuda`. Nobody has run it on one so far."""
