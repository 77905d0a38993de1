"""Dynamic pruning in other libraries' training loops; each module needs its library, this package none."""
