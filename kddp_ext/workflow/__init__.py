"""What `kddp run` does: teacher → scratch → KD → KDDP on image classification, by the public API alone."""
