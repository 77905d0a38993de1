"""The KD stage of the workflow beside the usual loop of distillation code: `python -m benchmarks.classic_loop`."""
