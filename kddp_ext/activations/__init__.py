"""Activations of any layout, and the statistics that pruning needs of them."""
