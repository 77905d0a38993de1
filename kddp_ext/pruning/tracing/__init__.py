"""Finds the neurons of a model by tracing its forward pass."""
