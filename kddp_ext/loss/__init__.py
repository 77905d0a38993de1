"""The loss: its settings, checks, functions and module."""
