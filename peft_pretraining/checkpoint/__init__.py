"""Checkpoints: files, snapshots, the background writer, weights from disk, where a run starts."""
