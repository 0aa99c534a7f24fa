"""Documents to batches."""
