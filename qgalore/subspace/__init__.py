"""Low-rank subspaces of gradients: bases, when they are refreshed, what they are worth."""
