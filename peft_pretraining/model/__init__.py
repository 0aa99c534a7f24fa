"""The LLaMA: its shape, its weights, adapters, the loss."""
