"""Students as files."""
