"""Int8 products on CPUs: oneDNN through PyTorch, and our own fused operators."""
