"""The loss: its settings, checks, function and module."""
