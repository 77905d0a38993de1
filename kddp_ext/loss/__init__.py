"""The loss: settings, function, autograd and module."""
