"""Pre-training of LLaMA models: configuration, data, model, evaluation and reporting."""
