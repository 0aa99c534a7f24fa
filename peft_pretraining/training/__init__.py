"""A run: its plan, its record, its checkpoints, what follows when something goes wrong."""
