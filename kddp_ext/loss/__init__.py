"""The loss: its settings, function, autograd and module."""
