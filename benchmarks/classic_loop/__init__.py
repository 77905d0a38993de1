"""The workflow's KD stage compared with the usual distillation loop: `python -m benchmarks.classic_loop`."""
