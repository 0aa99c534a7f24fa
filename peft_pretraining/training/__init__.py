"""A run: its loop's steps, its record, what follows when something goes wrong."""
