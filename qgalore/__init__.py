"""Memory-efficient optimizers for large models: quantization, projection, low-rank updates. Needs torch alone."""
