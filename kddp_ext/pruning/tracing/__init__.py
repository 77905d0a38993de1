"""Which neurons a model has, found by tracing it."""
