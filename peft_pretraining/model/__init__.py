"""The model: its shape, its architecture, its weights, adapters, the loss."""
