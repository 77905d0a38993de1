"""Activations of any shape as matrices, their statistics, and their latest values."""
