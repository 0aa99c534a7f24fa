"""Models as transformers folders."""
