"""Callbacks for other libraries' training loops. Each module needs its library; the rest of the package does not."""
